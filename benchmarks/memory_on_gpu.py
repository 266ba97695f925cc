"""Predicted against measured GPU memory of real training steps, on a machine with CUDA.

    python benchmarks/memory_on_gpu.py [--json benchmarks/results/memory_on_gpu.json] [--only NAME ...]

Bases get random weights on the GPU itself, so that nothing is downloaded; each setting runs three steps in a
process of its own, within --limit seconds, all of them within --total. The JSON file is whole after every setting, so
that whatever ends this loses one row at most. Without CUDA only the predictions are printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config

from pytest_lora import estimate_memory
from pytest_lora.inspection.memory.live_model import ASSUMED, DeviceAnswers, of_device
from pytest_lora.inspection.transformers_internals import quantized_linears

GIB = 2**30

BASES: dict[str, Any] = {
    "qwen2.5-0.5b": lambda: Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": lambda: LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig,
    "llama-3.1-8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


@dataclass(frozen=True)
class Setting:
    """One step to measure; fields as in ``estimate_memory``."""

    base: str
    batch_size: int
    seq_len: int
    r: int = 16
    targets: Any = "all-linear"
    packed: str | None = None  # "nf4", or "nf4+dq" with double quantization
    checkpointing: bool = False
    padded: bool = False
    optimizer: str = "adamw_torch"
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.base, f"{self.batch_size}x{self.seq_len}", f"r{self.r}", self.packed or "bf16"]
        parts += ["checkpointing"] * self.checkpointing + ["padded"] * self.padded
        return " ".join([*parts, self.optimizer])


SETTINGS = (
    Setting("qwen2.5-0.5b", 8, 512),
    Setting("qwen2.5-0.5b", 2, 4096, r=4, targets=["q_proj", "v_proj"], checkpointing=True),
    Setting("llama-3.2-3b", 4, 700, r=32, targets=["q_proj", "v_proj"], padded=True),
    Setting("llama-3.2-3b", 1, 2048, r=256, packed="nf4", checkpointing=True),
    Setting("llama-2-7b", 1, 512, packed="nf4"),
    Setting("llama-2-7b", 4, 2048, packed="nf4+dq", checkpointing=True, optimizer="adamw_8bit"),
    Setting("llama-2-7b", 2, 1024, r=64, checkpointing=True),
    Setting("llama-3.1-8b", 2, 1024, packed="nf4+dq", checkpointing=True, padded=True),
    Setting("llama-3.1-8b", 1, 4096, r=8, targets=["q_proj", "v_proj"], packed="nf4", checkpointing=True),
    Setting("llama-3.1-8b", 4, 512, optimizer="adamw_8bit"),
)


def quantization(setting: Setting) -> BitsAndBytesConfig | None:
    if setting.packed is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=setting.packed.endswith("dq"),
        bnb_4bit_compute_dtype="bfloat16",
    )


def adapter(setting: Setting) -> LoraConfig:
    return LoraConfig(
        r=setting.r, lora_alpha=2 * setting.r, target_modules=setting.targets, task_type="CAUSAL_LM"
    )


def predicted(setting: Setting, gpu: DeviceAnswers) -> dict[str, int]:
    estimate = estimate_memory(
        adapter(setting),
        BASES[setting.base](),
        batch_size=setting.batch_size,
        seq_len=setting.seq_len,
        quantization=quantization(setting),
        gradient_checkpointing=setting.checkpointing,
        optimizer=setting.optimizer,
        padding_mask=setting.padded,
        workspace=gpu.workspace,
        attention=gpu.attention,
    )
    return {
        "allocated": estimate.peak_allocated,
        "reserved": estimate.peak_reserved,
        "after_step": estimate.after_step,
    }


def build(setting: Setting, device: torch.device) -> nn.Module:
    """The model with random weights on the device, quantized as it would be loaded."""
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = AutoModelForCausalLM.from_config(BASES[setting.base](), dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    packed = quantization(setting)
    arguments = {"use_reentrant": False}
    if packed is not None:
        whole = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        quantized_linears(model, packed)
        for name, module in whole.items():
            quantize(model.get_submodule(name), module, device)
        model.is_loaded_in_4bit = True
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=setting.checkpointing, gradient_checkpointing_kwargs=arguments
        )
    elif setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    model.config.use_cache = False
    return get_peft_model(model, adapter(setting)).train()


def quantize(packed: Any, whole: nn.Linear, device: torch.device) -> None:
    """Fill a layer of bitsandbytes from the layer that it replaced."""
    if packed is whole:
        return
    weight = packed.weight
    packed.weight = type(weight)(
        whole.weight.data,
        requires_grad=False,
        quant_type=weight.quant_type,
        compress_statistics=weight.compress_statistics,
        module=packed,
    ).to(device)
    packed.bias = whole.bias
    del whole.weight


def optimizer_of(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if setting.optimizer == "adamw_8bit":
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(trained, lr=1e-4)
    return torch.optim.AdamW(trained, lr=1e-4, foreach=True)


def measure(setting: Setting, device: torch.device) -> dict[str, int]:
    """Three steps as the Trainer takes them, under autocast; the peaks are those of the whole run of steps."""
    model = build(setting, device)
    optimizer = optimizer_of(setting, model)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(5, 1000, (setting.batch_size, setting.seq_len), device=device)
    mask = torch.ones_like(ids)
    if setting.padded:
        mask[0, : setting.seq_len // 8] = 0
    for _ in range(3):
        with torch.autocast(device.type, dtype=torch.bfloat16) if cuda else nullcontext():
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
    if not cuda:
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "after_step": torch.cuda.memory_allocated(),
    }


def place() -> torch.device:
    return torch.device("cuda")


def one(setting: Setting) -> dict[str, Any]:
    """Predict and, with CUDA, measure one setting in this process."""
    cuda = torch.cuda.is_available()
    gpu = of_device(place()) if cuda else ASSUMED
    start = time.perf_counter()
    foretold = predicted(setting, gpu)
    row: dict[str, Any] = {
        "setting": setting.name,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        **gpu._asdict(),
        "predicted": foretold,
        "seconds": time.perf_counter() - start,
    }
    if cuda:
        row["measured"] = seen = measure(setting, place())
        row["ratio"] = {name: foretold[name] / seen[name] for name in seen}
    return row


def command(setting: Setting) -> list[str]:
    return [sys.executable, __file__, "--one", setting.name]


def in_a_process(setting: Setting, limit: float) -> dict[str, Any]:
    """The row of a setting; where its process fails, dies or takes too long, the row says so."""
    if limit <= 0:
        return {"setting": setting.name, "error": "not run: no time is left"}
    try:
        run = subprocess.run(command(setting), capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"setting": setting.name, "error": f"took longer than {limit:.0f} s"}
    said = run.stdout.splitlines()
    try:
        row = json.loads(said[-1]) if said and not run.returncode else None
    except ValueError:
        row = None
    if isinstance(row, dict):
        return row
    last = (run.stderr.strip().splitlines() or ["without a word"])[-1]
    return {"setting": setting.name, "error": f"its process ended with {run.returncode}: {last}"}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the results so far; whoever ends this meanwhile leaves the file as it was."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    gpu = next((row["gpu"] for row in rows if row.get("gpu")), None)
    result = {"gpu": gpu, "versions": {n: version(n) for n in names}, "rows": rows}
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=2) + "\n")
    draft.replace(path)


def shown(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['setting']:60s} {row['error']}"
    ratios = "  ".join(f"{name} {ratio:.3f}" for name, ratio in row.get("ratio", {}).items())
    return f"{row['setting']:60s} {row['predicted']['allocated'] / GIB:7.2f} GiB  {ratios or 'not measured'}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--one", help="measure this setting in this process")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one setting")
    parser.add_argument("--total", type=float, default=600.0, help="seconds for all of them")
    chosen = parser.parse_args(arguments)
    if chosen.one:
        print(json.dumps(one(next(s for s in SETTINGS if s.name == chosen.one))))
        return
    end = time.monotonic() + chosen.total
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        if chosen.only and not any(word in setting.name for word in chosen.only):
            continue
        rows.append(in_a_process(setting, min(chosen.limit, end - time.monotonic())))
        print(shown(rows[-1]), flush=True)
        if chosen.json:
            write(chosen.json, rows)


if __name__ == "__main__":
    main()
