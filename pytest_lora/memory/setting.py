"""The setting of a training step: from what users write to facts, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_lora.facts.byte_sizes import parse_bytes
from pytest_lora.facts.memory import Checkpointing, Quantization, StepSetting

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_METHODS = ("nf4", "fp4", "int8")
_DTYPES = ("bfloat16", "float16", "float32")


def checked_setting(
    *,
    quantization: str | BitsAndBytesConfig | Quantization | None,
    dtype: str,
    gradient_checkpointing: Checkpointing,
    optimizer: str,
    padding_mask: bool,
    accumulation: int,
    outputs_held: bool,
    prepare_for_kbit: bool | None,
    autocast: bool | None,
    adapter_dtype: str,
    use_cache: bool,
    empty_cache: bool,
    workspace: int | str,
) -> StepSetting:
    """The arguments of ``estimate_memory`` as facts; batch size and sequence length are left at 1.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or is out of its range.
    """
    from pytest_lora.inspection.memory.optimizers import OPTIMIZERS

    _require_one_of("dtype", dtype, _DTYPES)
    _require_one_of("adapter_dtype", adapter_dtype, _DTYPES)
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
        workspace=parse_bytes(workspace, "workspace"),
        **flags,
    )


def _quantization(given: Any, dtype: str) -> Quantization | None:
    if given is None or isinstance(given, Quantization):
        return given
    if isinstance(given, str):
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


def _require_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


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
