"""A saved adapter, alone, on its base, and beside the configuration under which training is to go on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import refusing, require_config, require_expect
from pytest_lora.checks import NAMES_A_BASE, report_on, reported
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.figures.adapter_maps import checkpoint_maps
from pytest_lora.facts.measures import of_checkpoint
from pytest_lora.facts.served import served_checkpoint
from pytest_lora.findings import Report
from pytest_lora.rules import Rule, judge, rules_for
from pytest_lora.rules.selection import codes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig

    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.findings import Finding
    from pytest_lora.inspection.checkpoint.fit import Base


@refusing
def check_checkpoint(
    path: str | os.PathLike[str],
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge a saved adapter: whether its configuration, keys, shapes, dtypes, values and base belong together.

    The folder may come from anywhere. Nothing in it is unpickled (unless ``expect.read_pickle`` asks for it),
    imported or executed, no link out of it is followed, nothing is fetched. Headers are read first; values are read a
    few megabytes at a time, 2 GiB at most. What cannot be read is a finding, not an exception.

    Args:
        path: The adapter's folder, or a file in it.
        base: The base that it is for: a live model, a ``PretrainedConfig``, the path of a model folder or
            ``config.json`` (no weights are read), or the name of a public model. Without one, what the folder says
            itself is compared, and the public model that it names.
        expect: What is meant. ``fresh=True`` for an adapter saved before training, ``pretrained_head=True`` where the
            task head comes with the base, ``new_tokens`` for rows added to the vocabulary, ``config`` for what the
            adapter was to be, ``serve`` for the server that is to load it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report with the rules of the stage *checkpoint* (codes 4xx), and those rules of the stage *config* (1xx) that
        matter to a trained adapter: with a base all of these, without one those on its scaling and on what ``expect``
        says of rank, alpha, targets and scope.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is nothing at ``path``, the base cannot be read or built, or a code does not exist.
    """
    from pytest_lora.inspection.checkpoint import folder_of

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    folder = folder_of(path)
    return judge_checkpoint(
        folder, None if base is None else checkpoint_base(base), expect, select=select, ignore=ignore
    )


def checkpoint_base(base: Any) -> Base:
    """A base that adapters are compared with, built once for all of them.

    Raises:
        TypeError: It is nothing that a base can be made of.
        ValueError: It cannot be read or built, or carries adapters itself.
    """
    from pytest_lora.inspection.checkpoint.fit import Base

    return Base(base)


def judge_checkpoint(
    folder: Path, base: Base | None, expect: Expect, *, select: Iterable[str] = (), ignore: Iterable[str] = ()
) -> Report:
    """The report on one adapter folder; see ``check_checkpoint``."""
    from pytest_lora.inspection.quiet import collector

    with collector.paused():
        return _judged(folder, base, expect, select, ignore)


def _judged(
    folder: Path, base: Base | None, expect: Expect, select: Iterable[str], ignore: Iterable[str]
) -> Report:
    from pytest_lora.inspection.checkpoint import checkpoint_facts, public_base

    public = public_base(folder) if base is None else None
    facts = checkpoint_facts(folder, base or public, read_pickle=expect.read_pickle)
    findings = list(judge([facts], expect))
    findings += _of_the_config(facts, expect)
    served = None if expect.serve is None else served_checkpoint(facts)
    findings += () if served is None else judge([served], expect)
    subject = f"adapter {facts.name}"
    named = subject if facts.fit is None else f"{subject} on {facts.fit.base.title}"
    left = () if facts.fit is not None else ((f"no base given or known; {NAMES_A_BASE}", _compared()),)
    return reported(named, findings, select, ignore, checkpoint_maps(facts), of_checkpoint(facts), left)


def _compared() -> str:
    """How many rules need a base, in words."""
    number = sum(rule.on_saved not in (None, "alone") for rule in rules_for(ConfigFacts))
    return f"{number} config rules"


def _of_the_config(facts: CheckpointFacts, expect: Expect) -> Iterator[Finding]:
    """What the rules on configurations that fit saved ones say."""
    from pytest_lora.facts.saved_config import config_of_the_file

    fit = facts.fit
    if fit is None:
        config = config_of_the_file(facts)
        if config is not None:
            yield from judge([config], expect, where=lambda rule: rule.on_saved == "alone")
    elif fit.config is not None and not facts.is_foreign:
        # PEFT saves whole embeddings where the vocabulary was resized, whatever the configuration says.
        inputs, outputs = fit.base.input_embeddings, fit.base.output_embeddings
        stored = tuple(filter(None, (inputs, outputs))) if inputs and facts.holds(inputs) else ()
        compared, merged = fit.compared, expect.will_merge is True

        def matters(rule: Rule) -> bool:
            if rule.on_saved == "merged":
                return merged and compared
            return rule.on_saved in ("alone", "with_base") or (rule.on_saved == "refused" and not compared)

        yield from judge([replace(fit.config, stored=stored)], expect, where=matters)


@refusing
def check_resume(
    path: str | os.PathLike[str],
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether training can go on from a saved adapter under a configuration.

    A checkpoint of another rank, other targets, another alpha or another base is refused: LoRA shapes are fixed at
    initialisation, so that the remedy is to start fresh, or to go on with the configuration of the checkpoint.

    Args:
        path: The adapter's folder, or a file in it.
        config: The configuration of the run that is to go on. Its ``base_model_name_or_path`` is compared where it
            is set.
        base: The base, to find out which modules the configuration adapts on it; without one, names are compared,
            and ``target_modules="all-linear"`` is taken to be what it was.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report, with codes LORA920 to LORA925. Of a variant whose tensors are not followed (VeLoRA, KaSA, AdaLoRA,
        ...) its fields are compared at most, and ``not_judged`` says so.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is nothing at ``path``, a field of ``config`` cannot be used, the base cannot be built, or a
            code does not exist.
    """
    from pytest_lora.inspection.checkpoint import checkpoint_facts, folder_of
    from pytest_lora.inspection.config import config_facts
    from pytest_lora.inspection.resumption import resumption_facts

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_config(config)
    folder = folder_of(path)
    saved = checkpoint_facts(folder)
    asked = None if base is None else config_facts(config, base)
    if asked is None or asked.applied is None:  # what PEFT refuses has no layers to compare; then names are
        facts = resumption_facts(saved, config, None)
    else:
        facts = resumption_facts(saved, config, asked.layers, asked.applied)
    usable = saved.other_method is not None and facts.unusable is None
    not_followed = ((f"{saved.other_method}", "its modules and shapes"),) if usable else ()
    return report_on(f"resuming from {saved.name}", [facts], expect, select, ignore, not_judged=not_followed)
