"""By what a folder of adapter weights shows which tool wrote it, where that is not PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable

OTHER_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapters.safetensors", "adapter.safetensors")
"""What diffusers, mlx-lm and AdapterHub call a file of LoRA weights."""

_KEYS = (
    ("kohya-ss", re.compile(r"^lora_(?:unet|te\d?|transformer)_|\.(?:hada_w\d|lokr_w\d|diff)(?:_[ab])?$")),
    ("diffusers", re.compile(r"^(?:unet|transformer|text_encoder(?:_\d)?)\..*lora|[._]lora\.(?:down|up)\.")),
    ("kohya-ss", re.compile(r"lora_(?:down|up)\b")),
    ("AdapterHub", re.compile(r"\.loras\.[^.]+\.lora_[AB]$")),
    ("torchtune", re.compile(r"^layers\.\d+\.(?:attn|mlp)\..*\.lora_[ab]\.weight$")),
    ("mlx-lm", re.compile(r"\.lora_[ab]$")),
)
"""How the keys of other tools look."""

_FILES = (
    ("diffusers", re.compile(r"pytorch_lora_weights\.(?:safetensors|bin)")),
    ("mlx-lm", re.compile(r"(?:\d+_)?adapters\.(?:safetensors|npz)")),
    ("AdapterHub", re.compile(r"pytorch_adapter\.bin|adapter\.safetensors|adapter_setup\.json")),
    ("torchtune", re.compile(r"adapter_(?:model|\d+)\.pt")),
)
"""What other tools call the files of an adapter: diffusers ``LORA_WEIGHT_NAME``, mlx-lm ``tuner/trainer.py``, adapters
``utils.py``, torchtune ``training/checkpointing/_utils.py``."""


def tool_of_keys(names: Iterable[str]) -> str | None:
    """The tool whose keys are among these; None where there is none."""
    held = tuple(names)
    return next((tool for tool, keys in _KEYS if any(keys.search(name) for name in held)), None)


def tool_of_files(names: Iterable[str]) -> str | None:
    """The tool whose files are among these; None where there is none."""
    held = tuple(names)
    return next((tool for tool, files in _FILES if any(files.fullmatch(name) for name in held)), None)
