"""Real training steps whose GPU memory others measured and published, as arguments of ``estimate_memory``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig

GIB = 2**30
CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "measured_memory.json").read_text())


def base_of(case: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**{name: value for name, value in case["base"].items() if name != "model_type"})


def adapter_of(case: dict[str, Any]) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **case["lora"])


def setting_of(case: dict[str, Any]) -> dict[str, Any]:
    """How the step was run: by hand, without autocast, the cache emptied between steps."""
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    optional = {name: case[name] for name in ("padding_mask", "outputs_held", "use_cache") if name in case}
    return {
        "batch_size": case["batch_size"],
        "seq_len": case["seq_len"],
        "quantization": packed if case["quantization"] else None,
        "prepare_for_kbit": False,
        "gradient_checkpointing": case["gradient_checkpointing"],
        "optimizer": case["optimizer"],
        "autocast": False,
        "empty_cache": True,
        **optional,
    }


def measured(case: dict[str, Any]) -> int:
    """Bytes of the peak that was measured, reserved or allocated as the case says."""
    found = case["measured"]
    return int(found["bytes"] if "bytes" in found else found["gib"] * GIB)
