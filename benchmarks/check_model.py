"""Time of ``check_model`` against PEFT's own status calls, as a ratio within one process.

    python benchmarks/check_model.py [--rounds N] [--json benchmarks/results/check_model.json]

Both look at the same model: the shape of Llama-2-70B on the meta device under an adapter on all linear
layers. Rounds alternate, so that a busy machine slows both alike; medians are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_lora import check_model
from pytest_lora.rules import catalogue

BUDGET = 1.0

LLAMA_2_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32000,
)


def adapted_on_meta(config: LlamaConfig) -> PeftModel:
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    assert isinstance(model, PeftModel)
    return model


def peft_status(model: PeftModel) -> object:
    return model.get_layer_status(), model.get_model_status()


def seconds(call: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(rounds: int) -> dict[str, object]:
    model = adapted_on_meta(LLAMA_2_70B)
    contenders: dict[str, Callable[[], object]] = {
        "check_model": lambda: check_model(model),
        "peft_status": lambda: peft_status(model),
    }
    for call in contenders.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in sorted(contenders, reverse=bool(turn % 2)):
            times[name].append(seconds(contenders[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "check_model_seconds": medians["check_model"],
        "peft_status_seconds": medians["peft_status"],
        "ratio": medians["check_model"] / medians["peft_status"],
        "budget": BUDGET,
        "rounds": rounds,
        "rules": len(catalogue()),
        "adapted_modules": sum(1 for name, _ in model.named_modules() if name.endswith("lora_A.default")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def table(result: dict[str, object]) -> str:
    return "\n".join(
        (
            f"Llama-2-70B on meta, all-linear: {result['adapted_modules']} adapted modules, "
            f"{result['rules']} rules, medians of {result['rounds']} rounds",
            "",
            "| what | seconds | ratio | budget |",
            "| --- | ---: | ---: | ---: |",
            f"| `get_layer_status()` + `get_model_status()` | {result['peft_status_seconds']:.3f} | 1.00 | |",
            f"| `check_model` | {result['check_model_seconds']:.3f} | {result['ratio']:.2f} | <= {BUDGET} |",
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result to this file")
    options = parser.parse_args()
    result = measured(options.rounds)
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if float(str(result["ratio"])) <= BUDGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
