"""Saved adapters, and small ways to damage them."""

from __future__ import annotations

import atexit
import json
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from pytest_lora.inspection.peft_state import save_adapters

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = "org/tiny-llama"
"""What ``base_model_name_or_path`` says in a saved example."""

Tensors = dict[str, torch.Tensor]


@cache
def scratch() -> Path:
    """A folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="pytest_lora_")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def save_adapter(folder: Path, base: nn.Module, **fields: Any) -> Path:
    """Save an adapter whose values are those of a trained one, as PEFT saves it, into a new folder in this one.

    There is no model card, whose template takes longer than all the rest.
    """
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    path = folder / f"adapter{len(list(folder.iterdir()))}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**{**defaults, **fields}))
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        save_adapters(model, str(path))
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


def configure(path: Path, **fields: Any) -> Path:
    """Set fields of the configuration; None takes a field out."""
    file = path / CONFIG
    written = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in written.items() if value is not None}))
    return path


def edit(path: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Write the tensors anew, changed."""
    changed = change(load_file(path / WEIGHTS))
    save_file({name: tensor.clone().contiguous() for name, tensor in changed.items()}, path / WEIGHTS)
    return path


def cut(path: Path, name: str = WEIGHTS, by: int = 100) -> Path:
    """Take bytes off the end of a file."""
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-by])
    return path


def remove(path: Path, name: str) -> Path:
    """Remove a file."""
    (path / name).unlink()
    return path


def rename(path: Path, name: str, to: str) -> Path:
    """Rename a file."""
    (path / name).rename(path / to)
    return path


def pickle_weights(path: Path) -> Path:
    """Put a pickle in the place of the safetensors file."""
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    return remove(path, WEIGHTS)
