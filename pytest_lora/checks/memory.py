"""A training step against the memory of a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Unpack

from pytest_lora.arguments import require_expect
from pytest_lora.checks import report_on
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.curves import memory_budget
from pytest_lora.facts.measures import of_memory
from pytest_lora.findings import Report
from pytest_lora.memory import StepArguments, names_settings
from pytest_lora.rules.selection import codes
from pytest_lora.values import require_flag

if TYPE_CHECKING:
    import os

    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig

    from pytest_lora.facts.memory import MemoryEstimate


@names_settings
def check_memory(
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    *,
    batch_size: int,
    seq_len: int,
    budget: str | int | torch.device,
    advise: bool = True,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    **setting: Unpack[StepArguments],
) -> Report:
    """Judge whether a training step fits the memory of a GPU, without a GPU and without weights.

    Where it does not fit, other settings are estimated too, and the smallest change that fits comes first.

    Args:
        config: The adapter.
        base: As for ``estimate_memory``.
        batch_size: Sequences (or images) in a micro-batch.
        seq_len: Tokens in each, padding included.
        budget: GPU memory: ``"24GiB"``, whole bytes, or a CUDA device (``"cuda:0"``), which is asked, also for
            ``workspace`` and ``attention``. ``"8x80GiB"`` is that of each of ``gpus=8``.
        advise: Whether other settings are estimated where it does not fit, which takes a second or two. A
            search over many settings does without.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.
        setting: The other arguments of ``estimate_memory``: ``quantization``, ``dtype``,
            ``gradient_checkpointing``, ``optimizer`` and so on.

    Returns:
        A report with the rules of the stage *memory* (codes 5xx).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, the budget has no unit, the step cannot be traced, or a code does
            not exist.
    """
    from pytest_lora.memory.estimate import estimate_memory
    from pytest_lora.memory.frontier import cards_and_budget, is_device, require_budget

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_flag("advise", advise)
    cards, budget = cards_and_budget(budget, setting.get("gpus"))
    if cards is not None:
        setting = {**setting, "gpus": cards}
    limit = require_budget(budget)
    if is_device(budget):
        from pytest_lora.inspection.memory.live_model import of_device

        answers = of_device(budget)
        setting = {"workspace": answers.workspace, "attention": answers.attention, **setting}
    estimate = estimate_memory(config, base, batch_size=batch_size, seq_len=seq_len, **setting)
    plain: dict[str, Any] = {**setting}
    return _judge_memory(
        base, config, plain, estimate, limit, expect, advise=advise, select=select, ignore=ignore
    )


def judge_memory(model: nn.Module, estimate: MemoryEstimate, budget: int) -> Report:
    """The report on an estimate that ``estimate_of_model`` made; ``budget`` in bytes."""
    from pytest_lora.inspection.memory.live_model import described

    asked = estimate.setting
    found = described(model, asked.batch_size, asked.seq_len)
    if found is None:
        return Report(f"memory of a training step of {estimate.architecture}")
    own = ("batch_size", "seq_len", "trainer", "args")  # a live model says nothing of its trainer
    setting = {name: value for name, value in asdict(asked).items() if name not in own}
    setting["quantization"], setting["parallel"] = asked.quantization, asked.parallel
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
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    from pytest_lora.facts.memory import MemoryFacts
    from pytest_lora.memory.what_if import alternatives

    wanted = advise and estimate.peak_allocated > limit
    others = alternatives(base, config, setting, estimate, limit) if wanted else ()
    subject = f"memory of a training step of {estimate.architecture}"
    judged = MemoryFacts(estimate, limit, others)
    figures = (memory_budget(judged),)
    return report_on(subject, [judged], expect, select, ignore, figures, of_memory(estimate))
