"""The setting of a training step: from what users write to facts, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.memory import (
    AMPERE_WORKSPACE,
    BITSANDBYTES,
    Checkpointing,
    Quantization,
    StepSetting,
)
from pytest_lora.facts.memory_choices import (
    ATTENTION_KERNELS,
    FSDP,
    HALF_PRECISIONS,
    SHARDED,
    Attention,
    Evaluation,
    Kernels,
    Loss,
    Offload,
)
from pytest_lora.facts.numbers import parse_bytes
from pytest_lora.memory.parallel import checked_parallel, with_what_is_said
from pytest_lora.memory.trainer import (
    TRAINERS,
    checked_evaluation,
    checked_kernels,
    checked_loss,
    loss_fields,
    trainer_of,
)
from pytest_lora.values import require_flag, require_one_of, require_whole, shown

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

_DTYPES = ("bfloat16", "float16", "float32")
_SHORT = {**HALF_PRECISIONS, "half": "float16", "fp32": "float32", "float": "float32"}
_BITS = {"4bit": "nf4", "4-bit": "nf4", "8bit": "int8", "8-bit": "int8"}
"""What people call a quantization by its bits; nf4 and fp4 take the same memory."""

MOST_EDGE, MOST_IMAGES = 2**16, 2**20
"""Pixels of an image's edge, images in a sequence: far above what there is, within what a trace can hold."""

MOST_POINT = {"batch_size": 2**28, "seq_len": 2**24, "r": 2**20}
"""The longest context that a public model names is ten million tokens, and no matrix has a rank of a million."""

MOST_TOKENS = 2**28
"""Tokens in a step: beyond, sizes leave the 64 bits in which they are counted."""


def require_point(batch_size: Any, seq_len: Any, r: Any = 1) -> tuple[int, int, int]:
    """Batch size, sequence length and rank of a step.

    Raises:
        TypeError, ValueError: One is no whole number or out of its range; the message names it.
    """
    given = {"batch_size": batch_size, "seq_len": seq_len, "r": r}
    for name, value in given.items():
        require_whole(name, value, least=1, most=MOST_POINT[name])
    if batch_size * seq_len > MOST_TOKENS:
        raise ValueError(
            f"batch_size times seq_len must be at most {MOST_TOKENS:,} tokens, not {batch_size:,} times {seq_len:,}"
        )
    return batch_size, seq_len, r


def most_of(vary: str, batch_size: int, seq_len: int) -> int:
    """The largest value of one of them that ``require_point`` takes beside the others."""
    beside = {"batch_size": seq_len, "seq_len": batch_size}.get(vary)
    return MOST_POINT[vary] if beside is None else min(MOST_POINT[vary], MOST_TOKENS // beside)


def checked_setting(
    *,
    quantization: str | BitsAndBytesConfig | Quantization | None = None,
    dtype: str | torch.dtype = "bfloat16",
    gradient_checkpointing: Checkpointing | None = None,
    optimizer: str = "adamw_torch",
    padding_mask: bool = False,
    accumulation: int = 1,
    outputs_held: bool | None = None,
    prepare_for_kbit: bool | None = None,
    upcast: Sequence[str] = (),
    autocast: bool | str | None = None,
    adapter_dtype: str | torch.dtype | None = None,
    use_cache: bool = False,
    empty_cache: bool = False,
    workspace: int | str | None = None,
    attention: Attention | None = None,
    frozen: Sequence[str] = (),
    images: int = 1,
    image_size: int | tuple[int, int] | None = None,
    trainer: str | None = None,
    args: Any = None,
    padding_free: bool = False,
    gpus: int | None = None,
    strategy: str | None = None,
    offload: Offload | None = None,
    reshard_after_forward: bool | None = None,
    wrap: Sequence[str] = (),
    shard_size: int | None = None,
    parallel: Any = None,
    evaluation: Evaluation | None = None,
    loss: Loss | None = None,
    kernels: Kernels | None = None,
) -> StepSetting:
    """The arguments of ``estimate_memory`` as facts; batch size and sequence length are left at 1.

    The one place of their defaults.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or is out of its range.
    """
    from pytest_lora.inspection.memory.optimizers import OPTIMIZERS

    trainer = _trainer(trainer, args)
    by_trl = trainer.startswith("trl-")
    dtype = _dtype("dtype", dtype)
    attention = "flash" if attention is None else attention
    require_one_of("attention", attention, ATTENTION_KERNELS)
    require_one_of("optimizer", optimizer, tuple(OPTIMIZERS))
    packed = _quantization(quantization, dtype)
    shared = checked_parallel(gpus, strategy, offload, reshard_after_forward, wrap, shard_size, parallel)
    # FSDP divides what has one dtype: norms in float32 beside packed weights are refused.
    by_fsdp = shared is not None and shared.strategy in FSDP
    kbit = packed is not None and (packed.by_bitsandbytes or packed.method == "gptq")
    kbit = kbit and not by_trl and not by_fsdp
    gradient_checkpointing, autocast = with_what_is_said(parallel, gradient_checkpointing, autocast)
    if adapter_dtype is None:  # TRL keeps adapters of QLoRA in bfloat16, PEFT in float32
        adapter_dtype = "bfloat16" if by_trl and packed is not None else "float32"
    if gradient_checkpointing is None:
        gradient_checkpointing = by_trl
    if not isinstance(gradient_checkpointing, bool | str) or gradient_checkpointing not in (
        True,
        False,
        "reentrant",
    ):
        raise ValueError(
            f"gradient_checkpointing must be True, False or 'reentrant', not {shown(gradient_checkpointing)}"
        )
    if outputs_held is None:
        outputs_held = trainer == "loop"
    flags = {
        "padding_mask": padding_mask,
        "outputs_held": outputs_held,
        "use_cache": use_cache,
        "empty_cache": empty_cache,
        "padding_free": padding_free,
        "prepare_for_kbit": kbit if prepare_for_kbit is None else prepare_for_kbit,
    }
    for name, value in flags.items():
        require_flag(name, value)
    return StepSetting(
        batch_size=1,
        seq_len=1,
        quantization=packed,
        dtype=dtype,
        adapter_dtype=_dtype("adapter_dtype", adapter_dtype),
        autocast=_autocast(autocast, dtype, trainer),
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        accumulation=require_whole("accumulation", accumulation, least=1),
        workspace=AMPERE_WORKSPACE if workspace is None else parse_bytes(workspace, "workspace"),
        attention=attention,
        frozen=_names("frozen", frozen, "lora_A"),
        upcast=_names("upcast", upcast, "norm"),
        images=require_whole("images", images, least=0, most=MOST_IMAGES),
        image_size=_image_size(image_size),
        trainer=trainer,
        parallel=shared,
        evaluation=checked_evaluation(evaluation, sharded=shared is not None and shared.strategy in SHARDED),
        loss=checked_loss(loss, kernels, trainer),
        kernels=checked_kernels(kernels),
        args=() if args is None else loss_fields(args, whole=by_trl),
        **flags,
    )


def _quantization(given: Any, dtype: str) -> Quantization | None:
    if given is None or isinstance(given, Quantization):
        return given
    if isinstance(given, str):
        given = _BITS.get(given, given)
        require_one_of("quantization", given, BITSANDBYTES)
        return Quantization(given, compute_dtype=dtype)
    if not hasattr(given, "load_in_4bit") or not hasattr(given, "load_in_8bit"):
        raise TypeError(
            f"quantization must be one of {', '.join(BITSANDBYTES)}, a BitsAndBytesConfig or None, "
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


def declared_quantization(config: Any) -> Quantization | None:
    """How a checkpoint is stored by its own configuration.

    Raises:
        ValueError: It is stored in a way that is not known here.
    """
    parts = (config, getattr(config, "text_config", None))
    found = next((d for p in parts if (d := getattr(p, "quantization_config", None))), None)
    if found is None:
        return None
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method", "bitsandbytes")))
    if values.get("dequantize"):
        return None
    if method.startswith("bitsandbytes"):
        return _quantization(_bitsandbytes(values), "bfloat16")
    if method not in ("gptq", "awq", "fp8", "mxfp4"):
        raise ValueError(
            f"base: its weights are stored by {method!r}, which is not known here; known are bitsandbytes, gptq, awq, "
            "fp8 and mxfp4. Without quantization_config in its configuration it is estimated in dtype"
        )
    skipped = values.get("modules_to_not_convert") or ()
    block = values.get("weight_block_size")
    group = values.get("group_size", 128)
    return Quantization(
        method,
        skip_modules=tuple(skipped),
        bits=int(values.get("bits", values.get("w_bit", 4)) or 4),
        group_size=group if group and group > 0 else None,
        block_size=(int(block[0]), int(block[1])) if block else None,
    )


def _bitsandbytes(values: dict[str, Any]) -> Any:
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    return make.from_dict(values)


def _names(name: str, given: Any, example: str) -> tuple[str, ...]:
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    if not listed or not all(isinstance(one, str) and one for one in given):
        raise TypeError(f'{name} must be a list of names such as ["{example}"], not {shown(given)}')
    return tuple(given)


def _dtype(name: str, given: Any) -> str:
    """The name of a dtype, of itself, its name or what it is called for short."""
    written: Any = str(given) if type(given).__name__ == "dtype" else given
    if isinstance(written, str):
        written = written.removeprefix("torch.")
        written = _SHORT.get(written, written)
    require_one_of(name, written, _DTYPES)
    return str(written)


def _trainer(given: Any, args: Any) -> str:
    """The name of the trainer; empty where a step is described by the other arguments alone."""
    if given is not None and not (isinstance(given, str) and given == ""):
        require_one_of("trainer", given, TRAINERS)
    if args is None or isinstance(args, tuple):
        return given or ""
    found = trainer_of(args)
    if given and given != found:
        raise ValueError(
            f"trainer: a {type(args).__name__} is for {found!r}, not {given!r}; leave one of them out"
        )
    return found


def _autocast(given: Any, dtype: str, trainer: str) -> str:
    """The dtype of autocast; a trainer's is bfloat16 over weights in float32."""
    if given is None:
        given = dtype != "float32" and trainer != "loop"
    if given is False or (isinstance(given, str) and not given):
        return ""
    if given is True:
        return "bfloat16" if dtype == "float32" else dtype
    return _dtype("autocast", given)


def _image_size(given: Any) -> int | tuple[int, int] | None:
    if given is None:
        return None
    if isinstance(given, (tuple, list)):
        if len(given) != 2:
            raise TypeError(f"image_size must be an edge or a pair (height, width), not {shown(given)}")
        height, width = (require_whole("image_size", edge, least=1, most=MOST_EDGE) for edge in given)
        return height, width
    return require_whole("image_size", given, least=1, most=MOST_EDGE)
