"""A training step against the memory of a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import (
    require_expect,
)
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.drawing import (
    memory_budget,
)
from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    import os

    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig

    from pytest_lora.facts.memory import MemoryEstimate


def check_memory(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    config: LoraConfig,
    *,
    batch_size: int,
    seq_len: int,
    budget: str | int | torch.device,
    advise: bool = True,
    expect: Expect | None = None,
    **setting: Any,
) -> Report:
    """Judge whether a training step fits the memory of a GPU, without a GPU and without weights.

    Where it does not fit, other settings are estimated too, and the smallest change that fits comes first.

    Args:
        base: As for ``estimate_memory``.
        config: The adapter.
        batch_size: Sequences (or images) in a micro-batch.
        seq_len: Tokens in each, padding included.
        budget: GPU memory: ``"24GiB"``, whole bytes, or a CUDA device (``"cuda:0"``), which is asked.
        advise: Whether other settings are estimated where it does not fit, which takes a second or two. A
            search over many settings does without.
        expect: What is meant, where only the user can know it.
        setting: The other arguments of ``estimate_memory``: ``quantization``, ``dtype``,
            ``gradient_checkpointing``, ``optimizer`` and so on.

    Returns:
        A report with the rules of the stage *memory* (codes 5xx).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, the budget has no unit, or the step cannot be traced.
    """
    from pytest_lora.memory.budget import require_budget
    from pytest_lora.memory.estimate import estimate_memory

    expect = require_expect(expect)
    if not isinstance(advise, bool):
        raise TypeError(f"advise must be True or False, not {advise!r}")
    limit = require_budget(budget)
    estimate = estimate_memory(base, config, batch_size=batch_size, seq_len=seq_len, **setting)
    return _judge_memory(base, config, setting, estimate, limit, expect, advise=advise)


def judge_memory(model: nn.Module, estimate: MemoryEstimate, budget: int) -> Report:
    """The report on an estimate that ``estimate_of_model`` made; ``budget`` in bytes."""
    from pytest_lora.inspection.memory.live_model import described

    asked = estimate.setting
    found = described(model, asked.batch_size, asked.seq_len)
    if found is None:
        return Report(f"memory of a training step of {estimate.architecture}")
    setting = {name: value for name, value in asdict(asked).items() if name not in ("batch_size", "seq_len")}
    setting["quantization"] = asked.quantization
    return _judge_memory(found.base, found.config, setting, estimate, budget, Expect())


def _judge_memory(
    base: Any,
    config: LoraConfig,
    setting: dict[str, Any],
    estimate: MemoryEstimate,
    limit: int,
    expect: Expect,
    *,
    advise: bool = True,
) -> Report:
    from pytest_lora.facts.memory import MemoryFacts
    from pytest_lora.memory.what_if import alternatives

    wanted = advise and estimate.peak_allocated > limit
    others = alternatives(base, config, setting, estimate, limit) if wanted else ()
    subject = f"memory of a training step of {estimate.architecture}"
    judged = MemoryFacts(estimate, limit, others)
    return Report(subject, tuple(judge([judged], expect)), (memory_budget(judged),))
