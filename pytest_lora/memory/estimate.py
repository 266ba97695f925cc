"""Predicted GPU memory of a training step, without a GPU and without weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from pytest_lora.facts.memory import MemoryEstimate, StepSetting
from pytest_lora.memory.arguments import StepArguments, names_settings
from pytest_lora.memory.setting import checked_setting, require_count

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig

    from pytest_lora.inspection.memory.predictor import Predictor

    Base: TypeAlias = nn.Module | PretrainedConfig | str | os.PathLike[str]


@names_settings
def estimate_memory(
    config: LoraConfig,
    base: Base,
    *,
    batch_size: int,
    seq_len: int,
    **setting: Unpack[StepArguments],
) -> MemoryEstimate:
    """Predict the GPU memory of one training step.

    The installed code of transformers, bitsandbytes and PEFT runs the step on tensors without values, every
    storage is followed from its making to its end, and CUDA's caching allocator is replayed over it. Layers
    that are like their neighbours are run once and counted often. Nothing is read, downloaded or changed.

    Args:
        config: The adapter. It and the base are understood in either order.
        base: A live model without adapter, a ``PretrainedConfig``, or the path of a model folder or
            ``config.json``.
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
            ``autocast_adapter_dtype=False``; it holds for gradients and optimizer states too.
        use_cache: Whether the model keeps keys and values for generation while it trains.
        empty_cache: Whether the loop calls ``torch.cuda.empty_cache`` between steps.
        workspace: Bytes of a workspace of cuBLAS, of which forward and backward have one each: 8,519,680 on Ampere and
            Ada, ``"32MiB"`` on Hopper. Default: that of the GPU on which a live base lies, else 8,519,680.
        attention: Kernel that PyTorch's attention takes without a mask: ``"flash"``, ``"cudnn"``, ``"efficient"`` or
            ``"math"``, which holds the scores. Default: what PyTorch chooses on that GPU, else ``"flash"``. With a
            mask it is the memory-efficient one.
        frozen: Parameters of the adapter that are not trained: ``["lora_A"]`` as in LoRA-FA, or whole names in
            the base. ``optimizer="lorafa"``, PEFT's own, freezes them by itself.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, the base cannot be built, PEFT refuses the
            configuration, or the model does something that needs values; the message names it.
    """
    return step_memory(config, base, **setting).estimate(batch_size, seq_len)


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
            require_count("batch_size", batch_size),
            require_count("seq_len", seq_len),
            self.rank if r is None else require_count("r", r),
        )


@names_settings
def step_memory(config: LoraConfig, base: Base, **setting: Unpack[StepArguments]) -> StepMemory:
    """The memory of one base and adapter at any batch size, sequence length and rank.

    For many estimates, which then share what they have in common.

    Args:
        config: The adapter.
        base: As for ``estimate_memory``.
        setting: The other arguments of ``estimate_memory``, ``batch_size`` and ``seq_len`` aside.

    Raises:
        TypeError, ValueError: As ``estimate_memory``.
    """
    checked = checked_setting(**{**setting, **_answers(base, setting)})
    if isinstance(base, (str, os.PathLike)):
        from pytest_lora.inspection.skeleton import read_config

        base = read_config(Path(base))
    return StepMemory(_predictor(base, config, checked), config.r)


def _answers(base: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What the GPU of a live base answers for the arguments that are not given."""
    from pytest_lora.inspection.memory.devices import of_model

    return {name: answer for name, answer in of_model(base)._asdict().items() if setting.get(name) is None}


_KEPT = 64
_predictors: dict[Any, Predictor] = {}


def _predictor(base: Any, config: LoraConfig, setting: StepSetting) -> Predictor:
    """What predicts for a base, an adapter of any rank, and a setting; kept, as its traces are worth keeping.

    A live model may change, so that nothing is kept for it.
    """
    from transformers import PretrainedConfig

    from pytest_lora.inspection.memory.predictor import Predictor

    if not isinstance(base, PretrainedConfig):
        return Predictor(base, config, setting)
    adapter = {name: value for name, value in vars(config).items() if name not in ("r", "lora_alpha")}
    key = (_identity(base), type(config), _identity(adapter), setting)
    if key not in _predictors:
        if len(_predictors) >= _KEPT:
            del _predictors[next(iter(_predictors))]
        _predictors[key] = Predictor(copy.deepcopy(base), copy.deepcopy(config), setting)
    return _predictors[key]


def _identity(value: Any) -> Hashable:
    """What tells one configuration from another: every attribute, private ones too (the attention, for one)."""
    if isinstance(value, Mapping):
        return frozenset((str(name), _identity(part)) for name, part in value.items())
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_identity, value))
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    if hasattr(value, "__dict__") and not isinstance(value, (type, Enum)):
        return type(value), _identity(vars(value))
    return type(value), repr(value)


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
