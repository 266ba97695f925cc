"""Predicted GPU memory of a training step, without a GPU and without weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_lora.byte_sizes import format_bytes, parse_bytes
from pytest_lora.facts.memory import (
    AMPERE_WORKSPACE,
    Checkpointing,
    MemoryEstimate,
    Quantization,
    StepSetting,
)

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import BitsAndBytesConfig, PretrainedConfig

    from pytest_lora.inspection.memory.predictor import Predictor

Vary = Literal["batch_size", "seq_len", "r"]

_METHODS = ("nf4", "fp4", "int8")
_DTYPES = ("bfloat16", "float16", "float32")
_SMALLEST_BUDGET = 2**20
_LARGEST = {"batch_size": 2**16, "seq_len": 2**22, "r": 2**14}


def estimate_memory(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    config: LoraConfig,
    *,
    batch_size: int,
    seq_len: int,
    quantization: str | BitsAndBytesConfig | None = None,
    dtype: str = "bfloat16",
    gradient_checkpointing: Checkpointing = False,
    optimizer: str = "adamw_torch",
    padding_mask: bool = False,
    accumulation: int = 1,
    outputs_held: bool = False,
    prepare_for_kbit: bool | None = None,
    autocast: bool | None = None,
    adapter_dtype: str = "float32",
    use_cache: bool = False,
    empty_cache: bool = False,
    workspace: int | str = AMPERE_WORKSPACE,
) -> MemoryEstimate:
    """Predict the GPU memory of one training step.

    The installed code of transformers, bitsandbytes and PEFT runs the step on tensors without values, every
    storage is followed from its making to its end, and CUDA's caching allocator is replayed over it. Layers
    that are like their neighbours are run once and counted often. Nothing is read, downloaded or changed.

    Args:
        base: A live model without adapter, a ``PretrainedConfig``, or the path of a model folder or
            ``config.json``.
        config: The adapter.
        batch_size: Sequences (or images) in a micro-batch, at least 1.
        seq_len: Tokens in each, padding included, at least 1.
        quantization: ``"nf4"``, ``"fp4"`` (4 bits, no double quantization), ``"int8"``, a
            ``BitsAndBytesConfig``, or None for a base in ``dtype``.
        dtype: Dtype of the unquantized weights: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        gradient_checkpointing: ``False``, ``True`` (non-reentrant) or ``"reentrant"``.
        optimizer: As in ``TrainingArguments(optim=...)``.
        padding_mask: Whether batches hold padding: attention then needs a mask, and another kernel.
        accumulation: Micro-batches to one optimizer step.
        outputs_held: Whether the loop keeps the model's outputs (logits) while it goes backward. The Trainer
            does not.
        prepare_for_kbit: Whether PEFT's ``prepare_model_for_kbit_training`` is called, which casts what is not
            quantized to float32. Default: yes if the base is quantized.
        autocast: Whether the forward runs under ``torch.autocast``, as in the Trainer with ``bf16=True`` or
            ``fp16=True``. Default: yes where ``dtype`` is one of these.
        adapter_dtype: Dtype of the adapter: PEFT keeps it in ``"float32"`` unless
            ``autocast_adapter_dtype=False``.
        use_cache: Whether the model keeps keys and values for generation while it trains.
        empty_cache: Whether the loop calls ``torch.cuda.empty_cache`` between steps.
        workspace: Bytes of cuBLAS's workspace: 8,519,680 on Ampere and Ada, ``"32MiB"`` on Hopper.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, the base cannot be built, PEFT refuses the
            configuration, or the model does something that needs values; the message names it.
    """
    memory = step_memory(
        base,
        config,
        quantization=quantization,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        padding_mask=padding_mask,
        accumulation=accumulation,
        outputs_held=outputs_held,
        prepare_for_kbit=prepare_for_kbit,
        autocast=autocast,
        adapter_dtype=adapter_dtype,
        use_cache=use_cache,
        empty_cache=empty_cache,
        workspace=workspace,
    )
    return memory.estimate(batch_size, seq_len)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Memory of one base and adapter at any batch size, sequence length and rank, in bytes.

    The first points asked are traced, a few tenths of a second each; then a fit over a dozen traces answers,
    exactly and in a fraction of a millisecond (``peak_allocated``) or some ten (the others).

    Attributes:
        rank: ``r`` where none is given.
    """

    _predictor: Predictor
    rank: int

    def peak_allocated(self, batch_size: int, seq_len: int, r: int | None = None) -> int:
        """What ``torch.cuda.max_memory_allocated`` would say."""
        return self._predictor.peak_allocated(*self._point(batch_size, seq_len, r))

    def peak_reserved(self, batch_size: int, seq_len: int, r: int | None = None) -> int:
        """What ``torch.cuda.max_memory_reserved`` would say."""
        return self._predictor.peak_reserved(*self._point(batch_size, seq_len, r))

    def estimate(self, batch_size: int, seq_len: int, r: int | None = None) -> MemoryEstimate:
        """Everything about one step."""
        return self._predictor.estimate(*self._point(batch_size, seq_len, r))

    def _point(self, batch_size: int, seq_len: int, r: int | None) -> tuple[int, int, int]:
        return (
            _require_count("batch_size", batch_size),
            _require_count("seq_len", seq_len),
            self.rank if r is None else _require_count("r", r),
        )


def step_memory(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str], config: LoraConfig, **setting: Any
) -> StepMemory:
    """The memory of one base and adapter at any batch size, sequence length and rank.

    For many estimates, which then share what they have in common.

    Args:
        base: As for ``estimate_memory``.
        config: The adapter.
        setting: The other arguments of ``estimate_memory``, ``batch_size`` and ``seq_len`` aside.

    Raises:
        TypeError, ValueError: As ``estimate_memory``.
    """
    _require_config(config)
    checked = _setting(**setting)
    if isinstance(base, (str, os.PathLike)):
        from pytest_lora.inspection.skeleton import read_config

        base = read_config(Path(base))
    return StepMemory(_predictor(base, config, checked), config.r)


def largest_that_fits(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    config: LoraConfig,
    budget: str | int,
    *,
    vary: Vary,
    batch_size: int = 1,
    seq_len: int = 512,
    **setting: Any,
) -> int:
    """The largest batch size, sequence length or rank whose step fits a budget, 0 if none does.

    Args:
        base: As for ``estimate_memory``.
        config: The adapter.
        budget: GPU memory: ``"24GiB"``, or whole bytes. The peak that is allocated must not pass it.
        vary: ``"batch_size"``, ``"seq_len"`` or ``"r"``; the others stay as given.
        batch_size: Stays, unless it is varied.
        seq_len: Stays, unless it is varied.
        setting: The other arguments of ``estimate_memory``.

    Raises:
        TypeError, ValueError: As ``estimate_memory``; or the budget has no unit, or ``vary`` is none of these.
    """
    limit = require_budget(budget)
    if vary not in _LARGEST:
        raise ValueError(f"vary must be one of {', '.join(_LARGEST)}, not {vary!r}")
    memory = step_memory(base, config, **setting)
    point = {"batch_size": batch_size, "seq_len": seq_len, "r": config.r}

    def fits(value: int) -> bool:
        return memory.peak_allocated(**{**point, vary: value}) <= limit

    return _largest(fits, _LARGEST[vary])


def _largest(fits: Callable[[int], bool], bound: int) -> int:
    """The largest value up to a bound that fits, where all smaller ones do."""
    low, high = 0, 1
    while high <= bound and fits(high):
        low, high = high, 2 * high
    high = min(high, bound + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """The largest batch for one sequence length and rank.

    Attributes:
        seq_len: Tokens in each sequence.
        rank: ``r``.
        batch_size: The largest batch that fits, 0 where not even one sequence does.
        peak_allocated: Bytes that a step with this batch allocates at its peak; of batch 1 where none fits.
    """

    seq_len: int
    rank: int
    batch_size: int
    peak_allocated: int


@dataclass(frozen=True, slots=True)
class OomFrontier:
    """How far a budget goes: the largest batch per sequence length and rank.

    Attributes:
        base: Class of the base or of its configuration.
        budget: Bytes.
        rows: By sequence length, then by rank, in the order that was asked for.
    """

    base: str
    budget: int
    rows: tuple[FrontierRow, ...]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join((self._title(), *lines))

    def to_markdown(self) -> str:
        """The table in Markdown."""
        head, *rows = (f"| {' | '.join(row)} |" for row in self._cells())
        return "\n".join((f"{self._title()}:", "", head, f"|{' ---: |' * len(self._cells()[0])}", *rows))

    def _title(self) -> str:
        return f"Largest batch of {self.base} in {format_bytes(self.budget)}"

    def _cells(self) -> list[tuple[str, ...]]:
        ranks = list(dict.fromkeys(row.rank for row in self.rows))
        found = {(row.seq_len, row.rank): row.batch_size for row in self.rows}
        lengths = dict.fromkeys(row.seq_len for row in self.rows)
        return [
            ("sequence", *(f"r={rank}" for rank in ranks)),
            *((str(length), *(str(found[length, rank]) for rank in ranks)) for length in lengths),
        ]


def oom_frontier(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    config: LoraConfig,
    budget: str | int,
    *,
    seq_lens: Iterable[int] = (512, 1024, 2048, 4096),
    ranks: Iterable[int] | None = None,
    **setting: Any,
) -> OomFrontier:
    """The largest batch that fits a budget, for every sequence length and rank.

    Args:
        base: As for ``estimate_memory``.
        config: The adapter.
        budget: GPU memory: ``"24GiB"``, or whole bytes. The peak that is allocated must not pass it.
        seq_lens: Sequence lengths in tokens.
        ranks: Ranks; by default that of ``config`` alone.
        setting: The other arguments of ``estimate_memory``, ``batch_size`` and ``seq_len`` aside.

    Raises:
        TypeError, ValueError: As ``estimate_memory``; or the budget has no unit, or a list is empty or holds
            something that is no whole number above 0.
    """
    limit = require_budget(budget)
    lengths = _require_counts("seq_lens", seq_lens)
    wanted = None if ranks is None else _require_counts("ranks", ranks)
    memory = step_memory(base, config, **setting)
    rows = tuple(
        _frontier_row(memory, limit, length, rank) for length in lengths for rank in wanted or (memory.rank,)
    )
    return OomFrontier(_named(base), limit, rows)


def _frontier_row(memory: StepMemory, limit: int, seq_len: int, rank: int) -> FrontierRow:
    def fits(batch_size: int) -> bool:
        return memory.peak_allocated(batch_size, seq_len, rank) <= limit

    largest = _largest(fits, _LARGEST["batch_size"])
    return FrontierRow(seq_len, rank, largest, memory.peak_allocated(max(1, largest), seq_len, rank))


def _named(base: Any) -> str:
    """What a table calls a base: the class of a model or of its configuration, or the path."""
    return str(base) if isinstance(base, (str, os.PathLike)) else type(base).__name__


def _require_counts(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be whole numbers such as [512, 1024], not {values!r}")
    counts = tuple(dict.fromkeys(_require_count(name, value) for value in values))
    if not counts:
        raise ValueError(f"{name} must not be empty")
    return counts


def require_budget(budget: Any) -> int:
    """Bytes of a budget: a size, or a CUDA device, which is asked for its memory.

    Raises:
        TypeError, ValueError: It is no size, has no unit, or there is no such device.
    """
    if getattr(budget, "type", str(budget).partition(":")[0]) == "cuda":
        return _device_memory(budget)
    limit = parse_bytes(budget, "budget")
    if limit < _SMALLEST_BUDGET:
        raise ValueError(f'budget is {limit} bytes; write "{limit}GiB" for gibibytes')
    return limit


def _device_memory(device: Any) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f'budget is the device {str(device)!r}, but there is no CUDA device here; write "24GiB"'
        )
    size: int = torch.cuda.get_device_properties(device).total_memory
    return size


def _setting(
    *,
    quantization: str | BitsAndBytesConfig | None = None,
    dtype: str = "bfloat16",
    gradient_checkpointing: Checkpointing = False,
    optimizer: str = "adamw_torch",
    padding_mask: bool = False,
    accumulation: int = 1,
    outputs_held: bool = False,
    prepare_for_kbit: bool | None = None,
    autocast: bool | None = None,
    adapter_dtype: str = "float32",
    use_cache: bool = False,
    empty_cache: bool = False,
    workspace: int | str = AMPERE_WORKSPACE,
) -> StepSetting:
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
        accumulation=_require_count("accumulation", accumulation),
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


def _require_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return value


def _require_config(config: Any) -> None:
    from pytest_lora.inspection.peft_internals import LoraConfig

    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, not {type(config).__name__}")


_KEPT = 64
_predictors: dict[Any, Predictor] = {}


def _predictor(base: Any, config: LoraConfig, setting: StepSetting) -> Predictor:
    """What predicts for a base, an adapter of any rank, and a setting; kept, as its traces are worth keeping.

    A live model may change, so that nothing is kept for it.
    """
    from pytest_lora.inspection.memory.predictor import Predictor

    description = _described(base)
    if description is None:
        return Predictor(base, config, setting)
    fields = {k: v for k, v in vars(config).items() if k not in ("r", "lora_alpha")}
    key = (description, repr(sorted(fields.items(), key=str)), setting)
    if key not in _predictors:
        if len(_predictors) >= _KEPT:
            del _predictors[next(iter(_predictors))]
        _predictors[key] = Predictor(copy.deepcopy(base), copy.deepcopy(config), setting)
    return _predictors[key]


def _described(base: Any) -> str | None:
    """Text that tells one configuration from another; None for a live model."""
    from transformers import PretrainedConfig

    if isinstance(base, PretrainedConfig):
        return f"{type(base).__name__} {base.to_json_string(use_diff=False)}"
    return None


def estimate_of_model(model: nn.Module, batch: Any) -> MemoryEstimate | None:
    """What ``estimate_memory`` says of a live model with an adapter and a batch for it, with AdamW.

    Returns:
        None where the model has no configuration to build from, or the batch no ``input_ids``.

    Raises:
        ValueError: The step cannot be traced.
    """
    from pytest_lora.inspection.memory.live_model import described

    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    if ids is None or ids.dim() != 2:
        return None
    found = described(model, int(ids.shape[0]), int(ids.shape[1]))
    if found is None:
        return None
    predictor = _predictor(found.base, found.config, found.setting)
    return predictor.estimate(found.setting.batch_size, found.setting.seq_len, found.config.r)
