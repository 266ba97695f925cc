"""Steps that others measured and published, written down before any of them was predicted.

    python benchmarks/published_steps.py [--only WORDS] [--json benchmarks/results/published_steps.json]

Ratios are prediction over measurement, with the installed libraries; what the libraries of the row did otherwise is
in docs/memory_method.md. Each row has its source, its versions and its whole setting. A figure with three digits is
known to half of its last one only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig

from pytest_lora import estimate_memory
from pytest_lora.checks.run_setting import adapter_of
from pytest_lora.inspection.recipe import recipe_facts
from pytest_lora.inspection.recipe.adapter import fused_arguments, step_arguments

GIB, GB = 2**30, 10**9
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
QUERY_VALUE = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Row:
    """One published figure.

    Attributes:
        source: Repository and file.
        versions: Of the libraries it was measured with.
        measured: Bytes.
        setting: Of ``estimate_memory``; for a recipe its text stands under ``"recipe"``.
        unsaid: What the setting cannot say of the step, known before it was predicted.
    """

    name: str
    source: str
    versions: str
    measured: int
    kind: Literal["allocated", "reserved"]
    base: PretrainedConfig
    adapter: LoraConfig | None
    setting: dict[str, Any] = field(default_factory=dict)
    unsaid: str = ""


def base(model_type: str, **shape: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **shape)


def decoder(
    kind: str, width: int, inner: int, layers: int, heads: int, groups: int, words: int, **more: Any
) -> PretrainedConfig:
    shape: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": words,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
    }
    return base(kind, **{**shape, **more})


def lora(rank: int, alpha: int, dropout: float, modules: list[str], **more: Any) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, **more
    )


def nf4(*, twice: bool) -> Any:
    make: Any = BitsAndBytesConfig
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=twice,
        bnb_4bit_compute_dtype="bfloat16",
    )


def gptq(config: PretrainedConfig) -> PretrainedConfig:
    config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
    return config


def llama2() -> PretrainedConfig:
    return decoder("llama", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096)


def llama3() -> PretrainedConfig:
    return decoder("llama", 4096, 14336, 32, 32, 8, 128256)


def llama32(size: str) -> PretrainedConfig:
    wide = {"head_dim": 128 if size == "3B" else 64, "tie_word_embeddings": True}
    if size == "3B":
        return decoder("llama", 3072, 8192, 28, 24, 8, 128256, **wide)
    return decoder("llama", 2048, 8192, 16, 32, 8, 128256, **wide)


def mistral() -> PretrainedConfig:
    return decoder("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096)


def powerlm() -> PretrainedConfig:
    return decoder("granite", 2304, 9216, 40, 36, 36, 49152, tie_word_embeddings=True)


def llama70() -> PretrainedConfig:
    return decoder("llama", 8192, 28672, 80, 64, 8, 32000)


def of_fms() -> Iterator[Row]:
    """fms-acceleration's benchmark: Trainer, flash attention 2, reentrant checkpointing, bare AdamW."""
    adapter = lora(16, 16, 0.1, ATTENTION)
    folder = "foundation-model-stack/fms-acceleration scripts/benchmarks/refs/"
    tf448, tf445 = "t2.4 tf4.48.1 bnb0.43.3", "t2.4 tf4.45.2 bnb0.43.3"

    def row(
        name: str, file: str, versions: str, config: PretrainedConfig, batch: int, measured: int, **more: Any
    ) -> Row:
        unsaid = more.pop("unsaid", "")
        setting = {"seq_len": 4096, "gradient_checkpointing": "reentrant", "prepare_for_kbit": False, **more}
        setting = {"batch_size": batch, "autocast": setting.get("quantization") is not None, **setting}
        return Row(
            f"fms {name} {batch}x4096",
            folder + file,
            versions,
            measured,
            "allocated",
            config,
            adapter,
            setting,
            unsaid,
        )

    packed = {"quantization": nf4(twice=True)}
    half = {"dtype": "float16", "autocast": "float16"}
    yield row("Mistral-7B bf16 (4.48)", "a100_80gb.csv", tf448, mistral(), 4, 26_704_571_904)
    yield row("Mistral-7B nf4 (4.48)", "a100_80gb.csv", tf448, mistral(), 4, 16_373_838_336, **packed)
    yield row("Mistral-7B nf4 (4.48)", "a100_80gb.csv", tf448, mistral(), 8, 28_412_178_944, **packed)
    yield row("Llama-2-70B nf4 (4.48)", "a100_80gb.csv", tf448, llama70(), 4, 68_126_381_056, **packed)
    yield row("Mistral-7B GPTQ (4.48)", "a100_80gb.csv", tf448, gptq(mistral()), 4, 16_404_148_736, **half)
    yield row("Mistral-7B GPTQ (4.48)", "a100_80gb.csv", tf448, gptq(mistral()), 8, 28_442_489_344, **half)
    yield row("Llama-2-70B GPTQ (4.48)", "a100_80gb.csv", tf448, gptq(llama70()), 4, 67_069_711_872, **half)
    yield row("PowerLM-3B bf16", "a100_80gb_granite.csv", tf445, powerlm(), 8, 33_152_880_128)
    yield row("PowerLM-3B nf4", "a100_80gb_granite.csv", tf445, powerlm(), 4, 15_151_677_952, **packed)
    norms = (
        "norms are cast to float32, embeddings and head are cast back (TRL 0.13 peft_module_casting_to_bf16)"
    )
    for batch, measured in ((4, 20_669_338_112), (8, 37_002_646_016)):
        yield row(
            "Mistral-7B nf4 by TRL 0.13 (4.48)",
            "a100_80gb.csv",
            tf448,
            mistral(),
            batch,
            measured,
            **packed,
            unsaid=norms,
        )
    for batch, measured in ((4, 18_174_161_920), (8, 34_177_070_080)):
        yield row(
            "PowerLM-3B nf4 by TRL",
            "a100_80gb_granite.csv",
            tf445,
            powerlm(),
            batch,
            measured,
            **packed,
            unsaid=norms,
        )
    foak = "Unsloth's rotary embedding, RMSNorm and LoRA products (fms_acceleration_foak)"
    for batch, measured in ((4, 24_905_936_896), (16, 50_891_223_040)):
        yield row(
            "Llama-3-8B bf16 Liger loss",
            "a100_80gb_liger.csv",
            tf445,
            llama3(),
            batch,
            measured,
            loss="liger",
            autocast=True,
            unsaid=foak,
        )
    yield row(
        "Llama-3-8B nf4 Liger loss",
        "a100_80gb_liger.csv",
        tf445,
        llama3(),
        4,
        14_411_297_792,
        loss="liger",
        kernels="axolotl",
        **packed,
        unsaid=foak,
    )


def of_peft() -> Iterator[Row]:
    """PEFT's own benchmark on an L40S: a loop of its own, batches of 4, the longest of about 700 tokens."""
    folder = "huggingface/peft method_comparison/MetaMathQA/results/"
    setting: dict[str, Any] = {
        "batch_size": 4,
        "seq_len": 700,
        "padding_mask": True,
        "outputs_held": True,
        "use_cache": True,
        "prepare_for_kbit": False,
        "autocast": False,
        "empty_cache": True,
    }
    divided = {
        "target_modules_bd_a": ["o_proj", "down_proj"],
        "target_modules_bd_b": ["q_proj", "v_proj", "k_proj", "up_proj", "gate_proj"],
        "nblocks": 2,
    }
    adapters: dict[str, tuple[int, Callable[[], LoraConfig]]] = {
        "rank32": (22_292_725_760, lambda: lora(32, 64, 0.0, QUERY_VALUE)),
        "rank64": (22_552_772_608, lambda: lora(64, 128, 0.0, QUERY_VALUE)),
        "rank32-mica": (22_244_491_264, lambda: lora(32, 64, 0.0, QUERY_VALUE, init_lora_weights="mica")),
        "rank14-target-mlp-bdlora": (24_685_576_192, lambda: lora(14, 28, 0.0, MLP, use_bdlora=divided)),
    }
    for name, (measured, adapter) in adapters.items():
        file = f"{folder}lora--llama-3.2-3B-{name}.json"
        versions = "t2.13 tf5.13.1 2026-07"
        yield Row(
            f"PEFT {name}", file, versions, measured, "reserved", llama32("3B"), adapter(), dict(setting)
        )


def of_litgpt() -> Iterator[Row]:
    """litgpt's configurations, bf16-true, no checkpointing; its model pads no sequence of one."""
    source = "Lightning-AI/litgpt config_hub/finetune/README.md"
    then = "litgpt 2024-04 t2.2"
    everything = [*ATTENTION, *MLP, "lm_head"]
    phi = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"]
    phi2 = base(
        "phi",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=51200,
        partial_rotary_factor=0.4,
    )
    gemma = decoder("gemma", 2048, 16384, 18, 8, 1, 256000, head_dim=256, tie_word_embeddings=True)
    falcon = base(
        "falcon",
        hidden_size=4544,
        num_hidden_layers=32,
        num_attention_heads=71,
        vocab_size=65024,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        new_decoder_architecture=False,
    )
    tiny = decoder("llama", 2048, 5632, 22, 32, 4, 32000, max_position_embeddings=2048)
    attention = lora(32, 16, 0.05, QUERY_VALUE)
    rows: list[tuple[str, PretrainedConfig, LoraConfig, int, bool, float]] = [
        ("llama-3-8b/lora", llama3(), attention, 1, False, 19.73),
        ("llama-3-8b/qlora", llama3(), attention, 2, True, 17.41),
        ("llama-3.2-1b/lora", llama32("1B"), attention, 1, False, 4.49),
        ("llama-3.2-3b/lora", llama32("3B"), attention, 1, False, 9.67),
        ("llama-2-7b/lora", llama2(), attention, 2, False, 19.77),
        ("llama-2-7b/qlora", llama2(), attention, 2, True, 13.68),
        ("mistral-7b/lora", mistral(), attention, 2, False, 20.66),
        ("mistral-7b/qlora", mistral(), attention, 2, True, 14.29),
        ("tiny-llama/lora", tiny, lora(32, 16, 0.05, everything), 8, False, 13.50),
        ("phi-2/lora", phi2, lora(8, 16, 0.05, phi), 4, False, 13.98),
        ("gemma-2b/lora", gemma, lora(8, 16, 0.1, everything), 2, False, 12.62),
        ("falcon-7b/lora", falcon, lora(32, 16, 0.05, ["query_key_value"]), 1, False, 16.69),
    ]
    for name, config, adapter, batch, packed, measured in rows:
        setting = {
            "batch_size": batch,
            "seq_len": 512,
            "trainer": "loop",
            "adapter_dtype": "bfloat16",
            "accumulation": 2,
            "quantization": nf4(twice=False) if packed else None,
            "prepare_for_kbit": False,
        }
        unsaid = "litgpt's own model and loss; logits in float32"
        yield Row(
            f"litgpt {name} {batch}x512",
            source,
            then,
            int(measured * GB),
            "allocated",
            config,
            adapter,
            setting,
            unsaid,
        )


def of_qwen() -> Iterator[Row]:
    small = decoder("qwen2", 2048, 5504, 24, 16, 16, 151936, max_position_embeddings=8192)
    adapter = lora(64, 16, 0.05, [*ATTENTION, *MLP])
    for length, measured in ((1024, 8.4), (4096, 16.2), (8192, 21.8)):
        setting = {
            "batch_size": 1,
            "seq_len": length,
            "gradient_checkpointing": "reentrant",
            "autocast": True,
            "accumulation": 2,
        }
        yield Row(
            f"Qwen-1.8B LoRA r64 1x{length}",
            "QwenLM/Qwen README.md",
            "remote code t2.0 2023-11",
            int(measured * GIB),
            "reserved",
            small,
            adapter,
            setting,
            "the checkpoint's own code",
        )


RECIPE = """base_model: {model}
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: {accumulation}
micro_batch_size: 2
num_epochs: 1
optimizer: {optimizer}
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
attn_implementation: flash_attention_2
"""


def of_axolotl() -> Iterator[Row]:
    """Recipes of Axolotl that say what they take, as "about"; how it was read is not said."""
    shapes: dict[str, tuple[float, PretrainedConfig]] = {
        "ministral/ministral-small-qlora": (
            8.76,
            decoder("mistral", 4096, 12288, 36, 32, 8, 131072, head_dim=128, sliding_window=32768),
        ),
        "arcee/afm-4.5b-qlora": (7.8, decoder("arcee", 2560, 18432, 36, 20, 4, 128004, head_dim=128)),
        "apertus/apertus-8b-qlora": (8.7, decoder("apertus", 4096, 21504, 32, 32, 8, 131072)),
        "olmo3/olmo3-7b-qlora": (11.3, decoder("olmo3", 4096, 11008, 32, 32, 32, 100278)),
        "seed-oss/seed-oss-36b-qlora": (
            27.7,
            decoder("seed_oss", 5120, 27648, 64, 80, 8, 155136, head_dim=128, attention_bias=True),
        ),
        "plano/plano-4b-qlora": (
            5.1,
            decoder("qwen3", 2560, 9728, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=True),
        ),
        "hunyuan/hunyuan-v1-dense-qlora": (
            4.7,
            decoder(
                "hunyuan_v1_dense", 1024, 3584, 24, 16, 8, 120818, head_dim=128, tie_word_embeddings=True
            ),
        ),
    }
    for name, (measured, config) in shapes.items():
        olmo = name.startswith("olmo3")
        text = RECIPE.format(
            model=name.split("/")[1],
            accumulation=2 if olmo else 4,
            optimizer="adamw_8bit" if olmo else "adamw_bnb_8bit",
        )
        yield Row(
            f"axolotl {name}",
            f"axolotl-ai-cloud/axolotl examples/{name}.yaml, README.md beside it",
            "late 2025",
            int(measured * GIB),
            "allocated",
            config,
            None,
            {"recipe": text},
            "whether allocated or reserved was read",
        )


ROWS = (of_fms, of_peft, of_litgpt, of_qwen, of_axolotl)


def of_recipe(path: Path, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
    run = recipe_facts(path).setting
    assert run is not None
    step = step_arguments(run, None)
    assert step is not None
    return adapter_of(run, config), step | fused_arguments(run)


def predicted(row: Row) -> int:
    if "recipe" in row.setting:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(row.setting["recipe"])
            adapter, setting = of_recipe(path, row.base)
    else:
        adapter, setting = row.adapter, row.setting
    estimate = estimate_memory(adapter, row.base, **setting)
    return estimate.peak_reserved if row.kind == "reserved" else estimate.peak_allocated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a row's name")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {}
    for row in (row for rows in ROWS for row in rows() if asked.only in row.name):
        try:
            found[row.name] = round(predicted(row) / row.measured, 4)
        except (ValueError, LookupError) as error:
            found[row.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"{row.name:55s} {row.kind:9s} {found[row.name]}  ({row.versions})", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
