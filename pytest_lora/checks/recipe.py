"""A recipe, or the arguments of a script: what a run is told to do, judged before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import refusing, require_expect
from pytest_lora.checks import reported
from pytest_lora.checks.run_setting import JudgedRun, judged
from pytest_lora.expect import Expect
from pytest_lora.facts.memory import BITSANDBYTES
from pytest_lora.findings import Report
from pytest_lora.rules.selection import codes
from pytest_lora.values import require_one_of, require_path, require_whole, shown

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig, TrainingArguments


@refusing
def check_recipe(
    path: str | os.PathLike[str],
    *,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
    budget: str | int | torch.device | None = None,
    gpus: int | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge a recipe of Axolotl, LLaMA-Factory, TRL, ms-swift or one's own, before anything is loaded.

    The file and those that it names beside it are read, and nothing else is: no code, no weights, no network. What is
    no YAML is a finding; what is no LoRA training (full fine-tuning, merges, files of other tools) is left alone, and
    the subject of the report says so.

    Args:
        path: The recipe.
        base: The base, where it is not to be the one that the recipe names.
        budget: Memory of one GPU, as in ``"24GiB"``, or ``"8x80GiB"`` for ``gpus=8``; without it memory is not judged.
        gpus: How many GPUs take part, unless the recipe says more; 1 by default.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report with the rules of the stage *recipe* (codes 6xx), and those on the configuration (1xx) and the memory
        (5xx) of the run that it describes. Findings have ``file`` and ``line``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no file at ``path``, or the budget has no unit or names other cards than ``gpus``.
    """
    from pytest_lora.inspection.recipe import recipe_facts

    file = _file(path)
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    cards, limit = _cards(gpus, budget)
    facts = recipe_facts(file, base if isinstance(base, str) else None)
    run = judged(facts, base, limit, cards, expect, file.parent)
    placed = [replace(one, file=str(path), line=one.line) for one in run.findings]
    return _report(run._replace(findings=placed), select, ignore)


def _report(run: JudgedRun, select: Iterable[str], ignore: Iterable[str]) -> Report:
    figures = () if run.card is None else (run.card,)
    return reported(run.subject, run.findings, select, ignore, figures, not_judged=run.not_judged)


def _file(path: Any) -> Path:
    file = require_path("path", path)
    if not file.is_file():
        raise ValueError(f"path: there is no file {shown(str(file))}")
    return file


def _cards(gpus: Any, budget: Any) -> tuple[int, int | None]:
    """How many GPUs there are, and the bytes of one where memory is to be judged."""
    from pytest_lora.memory.frontier import cards_and_budget, require_budget

    if gpus is not None:
        require_whole("gpus", gpus, least=1)
    count, of_one = cards_and_budget(budget, gpus)
    return count or 1, None if of_one is None else require_budget(of_one)


@refusing
def check_run(
    args: TrainingArguments,
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    *,
    budget: str | int | torch.device | None = None,
    gpus: int | None = None,
    quantization: str | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge the arguments of a training script by the rules on recipes, before anything is loaded.

    Args:
        args: ``TrainingArguments``, or an ``SFTConfig`` or ``DPOConfig`` of TRL; nothing is changed.
        config: The adapter.
        base: The base: a live model, a ``PretrainedConfig``, a path, or the name of a public model.
        budget: Memory of one GPU, as in ``"24GiB"``, or ``"8x80GiB"`` for ``gpus=8``; without it memory is not judged.
        gpus: How many GPUs take part; 1 by default.
        quantization: How the script loads the base: ``"nf4"``, ``"fp4"``, ``"int8"``, or None.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report with the rules of the stages *recipe* (6xx), *config* (1xx) and *memory* (5xx).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base cannot be built, or the budget has no unit or names other cards than ``gpus``.
    """
    from pytest_lora.inspection.recipe import script_facts

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    cards, limit = _cards(gpus, budget)
    if quantization is not None:
        require_one_of("quantization", quantization, BITSANDBYTES)
    facts = script_facts(args, config, base, quantization)
    run = judged(facts, base, limit, cards, expect, Path(), config)
    return _report(run._replace(subject=run.subject.replace("recipe ", "run of ", 1)), select, ignore)
