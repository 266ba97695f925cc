"""The setting of a training step: from what users write to facts, checked."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.byte_sizes import parse_bytes
from pytest_lora.facts.memory import (
    AMPERE_WORKSPACE,
    ATTENTION_KERNELS,
    Attention,
    Checkpointing,
    Quantization,
    StepSetting,
)

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

_METHODS = ("nf4", "fp4", "int8")
_DTYPES = ("bfloat16", "float16", "float32")
_SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
_BITS = {"4bit": "nf4", "4-bit": "nf4", "8bit": "int8", "8-bit": "int8"}
"""What people call a quantization by its bits; nf4 and fp4 take the same memory."""


def checked_setting(
    *,
    quantization: str | BitsAndBytesConfig | Quantization | None = None,
    dtype: str | torch.dtype = "bfloat16",
    gradient_checkpointing: Checkpointing = False,
    optimizer: str = "adamw_torch",
    padding_mask: bool = False,
    accumulation: int = 1,
    outputs_held: bool = False,
    prepare_for_kbit: bool | None = None,
    autocast: bool | None = None,
    adapter_dtype: str | torch.dtype = "float32",
    use_cache: bool = False,
    empty_cache: bool = False,
    workspace: int | str | None = None,
    attention: Attention | None = None,
    frozen: Sequence[str] = (),
) -> StepSetting:
    """The arguments of ``estimate_memory`` as facts; batch size and sequence length are left at 1.

    The one place of their defaults.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or is out of its range.
    """
    from pytest_lora.inspection.memory.optimizers import OPTIMIZERS

    dtype = _dtype("dtype", dtype)
    adapter_dtype = _dtype("adapter_dtype", adapter_dtype)
    attention = "flash" if attention is None else attention
    _require_one_of("attention", attention, ATTENTION_KERNELS)
    _require_one_of("optimizer", optimizer, tuple(OPTIMIZERS))
    if gradient_checkpointing not in (True, False, "reentrant"):
        raise ValueError(
            f"gradient_checkpointing must be True, False or 'reentrant', not {gradient_checkpointing!r}"
        )
    packed = _quantization(quantization, dtype)
    flags = {
        "padding_mask": padding_mask,
        "outputs_held": outputs_held,
        "autocast": dtype != "float32" if autocast is None else autocast,
        "use_cache": use_cache,
        "empty_cache": empty_cache,
        "prepare_for_kbit": packed is not None if prepare_for_kbit is None else prepare_for_kbit,
    }
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")
    if flags["autocast"] and dtype == "float32":
        raise ValueError("autocast needs a dtype to cast to; give dtype='bfloat16', or autocast=False")
    return StepSetting(
        batch_size=1,
        seq_len=1,
        quantization=packed,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        accumulation=require_count("accumulation", accumulation),
        workspace=AMPERE_WORKSPACE if workspace is None else parse_bytes(workspace, "workspace"),
        attention=attention,
        frozen=_names("frozen", frozen),
        **flags,
    )


def _quantization(given: Any, dtype: str) -> Quantization | None:
    if given is None or isinstance(given, Quantization):
        return given
    if isinstance(given, str):
        given = _BITS.get(given, given)
        _require_one_of("quantization", given, _METHODS)
        return Quantization(given, compute_dtype=dtype)
    if not hasattr(given, "load_in_4bit") or not hasattr(given, "load_in_8bit"):
        raise TypeError(
            f"quantization must be one of {', '.join(_METHODS)}, a BitsAndBytesConfig or None, "
            f"not {type(given).__name__}"
        )
    skipped = tuple(given.llm_int8_skip_modules or ())
    if given.load_in_8bit:
        return Quantization("int8", compute_dtype=dtype, skip_modules=skipped)
    if not given.load_in_4bit:
        raise ValueError("quantization: this BitsAndBytesConfig loads neither in 4 nor in 8 bits")
    return Quantization(
        given.bnb_4bit_quant_type,
        double_quant=bool(given.bnb_4bit_use_double_quant),
        storage=str(given.bnb_4bit_quant_storage).removeprefix("torch."),
        compute_dtype=str(given.bnb_4bit_compute_dtype).removeprefix("torch."),
        skip_modules=skipped,
    )


def _names(name: str, given: Any) -> tuple[str, ...]:
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or not all(isinstance(n, str) for n in given)
    ):
        raise TypeError(f'{name} must be a list of names such as ["lora_A"], not {given!r}')
    return tuple(given)


def _dtype(name: str, given: Any) -> str:
    """The name of a dtype, of itself, its name or what it is called for short."""
    written: Any = str(given) if type(given).__name__ == "dtype" else given
    if isinstance(written, str):
        written = written.removeprefix("torch.")
        written = _SHORT_DTYPES.get(written, written)
    _require_one_of(name, written, _DTYPES)
    return str(written)


def _require_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}{meant}")


def require_count(name: str, value: Any) -> int:
    """A whole number above 0.

    Raises:
        TypeError, ValueError: It is none; the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return value
