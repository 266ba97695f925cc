"""Saved adapters, and small ways to damage them, under the names that the examples of rules use."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora.strategies.damage import WEIGHTS, configure, cut, edit, pickle_weights, remove, rename

__all__ = [
    "adapter",
    "add_base_weights",
    "configure",
    "cut",
    "edit",
    "pickle_weights",
    "remove",
    "rename",
    "write",
    "write_sparse",
]

NAME = "org/tiny-llama"


def adapter(scratch: Path, base: nn.Module, **fields: Any) -> Path:
    """Save an adapter whose values are those of a trained one, as PEFT saves it."""
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    path = scratch / f"adapter{len(list(scratch.iterdir()))}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**{**defaults, **fields}))
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(path)
        model.unload()
    return configure(path, base_model_name_or_path=NAME)


def add_base_weights(path: Path, base: nn.Module) -> Path:
    """Put the weights of the base into the adapter file, as model.state_dict() names them."""
    adapted = ("q_proj", "v_proj")

    def name(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        inner = ".base_layer" if module.endswith(adapted) else ""
        return f"base_model.model.{module}{inner}.{leaf}"

    return edit(path, lambda t: {**t, **{name(k): v.clone() for k, v in base.state_dict().items()}})


def write(path: Path, name: str, text: str) -> Path:
    """Write a file."""
    (path / name).write_text(text)
    return path


def write_sparse(path: Path, gigabytes: int) -> Path:
    """Add an output head of many gigabytes, all of it a hole in the file."""
    content = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    size = gigabytes * 2**30
    header["base_model.model.lm_head.weight"] = {
        "dtype": "F32",
        "shape": [size // 4],
        "data_offsets": [len(data), len(data) + size],
    }
    raw = json.dumps(header).encode()
    with open(path / WEIGHTS, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw + data)
        file.truncate(8 + len(raw) + len(data) + size)
    return path
