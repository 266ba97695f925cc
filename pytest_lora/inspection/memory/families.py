"""What divides the points of one base and setting into families whose steps differ in sizes alone."""

from __future__ import annotations

from typing import Any

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import WHOLE
from pytest_lora.inspection.memory.optimizers import OPTIMIZERS

_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window")


def shares_of(setting: StepSetting) -> int:
    """What a rank must be a multiple of, for sizes to be products of it; 0 where no two ranks are alike.

    FSDP2 divides the first dimension of every parameter, the rank of half the adapter, and rounds up. Optimizers in 8
    bits keep the state of small parameters in 32, and page that of large ones; ZeRO-3 keeps small ones whole.
    """
    shared = setting.parallel
    small = shared is not None and shared.strategy == "zero3"
    if small or OPTIMIZERS[setting.optimizer].paged or "8bit" in setting.optimizer:
        return 0
    if shared is None or shared.strategy not in ("fsdp2", "hsdp"):
        return 1
    return shared.shard_size or shared.gpus


def runs_alike(setting: StepSetting) -> bool:
    """Whether a shared step runs the same at each rank, though no two ranks hold alike: see ``shares_of``.

    FSDP gathers what it divides while the step runs; DDP and ZeRO by formula hold it beside the step.
    """
    shared = setting.parallel
    return shared is not None and shared.strategy in (*WHOLE, "zero3") and not shares_of(setting)


def numbers_of(base: Any) -> set[int]:
    """Whole numbers of a configuration: widths, and the size of the vocabulary."""
    config = getattr(base, "config", base)
    parts = (config, getattr(config, "text_config", None))
    return {n for part in parts if part is not None for n in vars(part).values() if isinstance(n, int)}


def thresholds_of(base: Any) -> list[int]:
    """Sequence lengths from which a model attends in another way."""
    config = getattr(base, "config", base)
    found: set[int] = set()
    for part in (config, getattr(config, "text_config", None)):
        values = (getattr(part, name, None) for name in _WINDOWS)
        found |= {value for value in values if isinstance(value, int) and value > 1}
    return sorted(found)
