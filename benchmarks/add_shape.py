"""Adds the shape of a public model to the package, from its config.json.

    python benchmarks/add_shape.py NAME CONFIG.JSON PARAMETERS [OTHER NAME ...]

NAME is the model's public name and PARAMETERS the count that it was published with (the safetensors metadata of its
page say it). The model is built without weights and counted; where the count differs, nothing is written.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPES = Path(__file__).parents[1] / "pytest_lora/bases/shapes.json"

NOT_SHAPE = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "initializer_factor",
        "bos_token_id",
        "eos_token_id",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "attention_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "dropout",
        "dropout_rate",
        "pretraining_tp",
        "output_router_logits",
        "router_aux_loss_coef",
        "torch_dtype",
        "id2label",
        "label2id",
        "quantization_config",
        "auto_map",
    ]
)
"""Fields that change neither a shape nor a module's name."""


def shape_fields(config: dict) -> dict:
    """The fields of a configuration that say its shape, parts included."""
    kept = {
        key: shape_fields(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in NOT_SHAPE
    }
    if labels := config.get("id2label"):
        kept["num_labels"] = len(labels)
    if dtype := config.get("dtype", config.get("torch_dtype")):
        kept["dtype"] = dtype
    return kept


def count(fields: dict) -> int:
    """Parameters of the model that these fields describe, tied ones once."""
    from transformers import AutoConfig

    from pytest_lora.inspection.skeleton import build_on_meta

    fields = dict(fields)
    model = build_on_meta(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return sum(parameter.numel() for parameter in model.parameters())


def main(name: str, file: str, published: str, *others: str) -> None:
    fields = shape_fields(json.loads(Path(file).read_text(encoding="utf-8")))
    wanted, found = int(published.replace(",", "")), count(fields)
    if found != wanted:
        sys.exit(
            f"{name}: built without weights it has {found:,} parameters, not {wanted:,}; nothing was written"
        )
    shapes = json.loads(SHAPES.read_text(encoding="utf-8"))
    shapes[name] = {"config": fields, "parameters": wanted} | ({"also": list(others)} if others else {})
    lines = (f" {json.dumps(key)}: {json.dumps(one, separators=(',', ':'))}" for key, one in shapes.items())
    SHAPES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{name}: {found:,} parameters; shapes.json has {SHAPES.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
