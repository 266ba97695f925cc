"""Published measurements of GPU memory against this package and against closed formulas, in one table.

    python benchmarks/memory_peers.py [--json benchmarks/results/memory_peers.json]

Ratios are prediction over measurement. fitcheck-llm takes part where it is installed; accelerate's figure is
that of ``accelerate estimate-memory`` for training with Adam in bfloat16, which knows no adapter, batch or
sequence. Two cases were measured with versions of transformers that made one float32 copy of the logits more.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from memory_cases import CASES, GIB, adapter_of, base_of, measured, setting_of

from pytest_lora import estimate_memory
from pytest_lora.inspection.skeleton import build_on_meta


def ours(case: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    estimate = estimate_memory(adapter_of(case), base_of(case), **setting_of(case))
    seconds = time.perf_counter() - start
    reserved = case["measured"]["kind"] == "max_memory_reserved"
    predicted = estimate.peak_reserved if reserved else estimate.peak_allocated
    after = case["measured"].get("after_step_gib")
    return {
        "predicted_gib": predicted / GIB,
        "ratio": predicted / measured(case),
        "after_step_ratio": estimate.after_step / (after * GIB) if after else None,
        "seconds": seconds,
    }


def fitcheck(case: dict[str, Any]) -> float | None:
    try:
        from fitcheck.config_parser import ModelConfig
        from fitcheck.estimator import TrainingConfig, estimate
        from fitcheck.gpu_db import GpuSpec
    except ImportError:
        return None
    base = base_of(case)
    model = ModelConfig(
        name=case["name"],
        num_params=sum(p.numel() for p in build_on_meta(base).parameters()),
        hidden_size=base.hidden_size,
        num_layers=base.num_hidden_layers,
        num_attention_heads=base.num_attention_heads,
        num_kv_heads=base.num_key_value_heads,
        intermediate_size=base.intermediate_size,
        vocab_size=base.vocab_size,
        head_dim=base.head_dim,
        tie_word_embeddings=base.tie_word_embeddings,
    )
    training = TrainingConfig(
        precision="bf16",
        quantization="nf4" if case["quantization"] else "none",
        double_quant=bool(case["quantization"]),
        batch_size=case["batch_size"],
        seq_len=case["seq_len"],
        lora_rank=case["lora"]["r"],
        lora_targets=case["lora"]["target_modules"],
        grad_checkpoint=bool(case["gradient_checkpointing"]),
        flash_attn=True,
    )
    report = estimate(model, training, GpuSpec("80 GB", vram_mib=81_920, usable_mib=81_920))
    return report.total_mib * 2**20 / measured(case)


def accelerate(case: dict[str, Any]) -> float:
    size, _ = calculate_maximum_sizes(build_on_meta(base_of(case)))
    return max(estimate_training_usage(size, "bfloat16").values()) / measured(case)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    rows = []
    print(f"{'case':50s} {'measured':>9s} {'ours':>6s} {'after':>6s} {'fitcheck':>8s} {'accelerate':>10s}")
    for case in CASES:
        row = {"case": case["name"], "measured_gib": measured(case) / GIB, **ours(case)}
        row |= {"fitcheck_ratio": fitcheck(case), "accelerate_ratio": accelerate(case)}
        rows.append(row)
        cells = [row[name] for name in ("ratio", "after_step_ratio", "fitcheck_ratio", "accelerate_ratio")]
        shown = [f"{cell:.3f}" if cell else "-" for cell in cells]
        print(
            f"{row['case']:50s} {row['measured_gib']:9.2f} {shown[0]:>6s} {shown[1]:>6s} {shown[2]:>8s} {shown[3]:>10s}"
        )
    if chosen.json:
        names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
        result = {
            "versions": {n: version(n) for n in names},
            "python": platform.python_version(),
            "rows": rows,
        }
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
