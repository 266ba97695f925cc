"""A saved adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import (
    require_expect,
)
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.drawing import (
    checkpoint_maps,
)
from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import nn
    from transformers import PretrainedConfig

    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.findings import Finding
    from pytest_lora.inspection.checkpoint.fit import Base


OF_SAVED_CONFIGS = frozenset(
    f"LORA{number}" for number in (101, 102, 103, 107, 108, 110, 114, 119, 120, 122, 124, 126, 127, 130)
)
"""Rules of the stage *config* that still matter when the training is over: what the adapter does on its base. Keys and
shapes say more about its targets than the names in its configuration."""


OF_FILES_ALONE = frozenset(f"LORA{number}" for number in (101, 102, 103, 108, 114, 126, 127))
"""Those that need no base: what rank, alpha and names in the folder itself say."""


OF_REFUSED_CONFIGS = OF_SAVED_CONFIGS | {"LORA104", "LORA105"}
"""Where PEFT cannot put the adapter on the base, so that keys were not compared, the names have to tell why."""


def check_checkpoint(
    path: str | os.PathLike[str],
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
    *,
    expect: Expect | None = None,
) -> Report:
    """Judge a saved adapter: whether its configuration, keys, shapes, dtypes, values and base belong together.

    The folder may come from anywhere. Nothing in it is unpickled (unless ``expect.read_pickle`` asks for it),
    imported or executed, no link out of it is followed, nothing is fetched. Headers are read first; values are read a
    few megabytes at a time, 2 GiB at most. What cannot be read is a finding, not an exception.

    Args:
        path: The adapter's folder, or a file in it.
        base: The base that it is for: a live model, a ``PretrainedConfig``, or the path of a model folder or
            ``config.json`` (no weights are read). Without one, what the folder says itself is compared.
        expect: What is meant. ``fresh=True`` for an adapter saved before training, ``pretrained_head=True`` where the
            task head comes with the base, ``new_tokens`` for rows added to the vocabulary, ``config`` for what the
            adapter was to be.

    Returns:
        A report with the rules of the stage *checkpoint* (codes 4xx), and those rules of the stage *config* (1xx) that
        matter to a trained adapter: with a base all of these, without one those on its scaling and on what ``expect``
        says of rank, alpha, targets and scope.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is nothing at ``path``, or the base cannot be read or built.
    """
    from pytest_lora.inspection.checkpoint import folder_of

    expect = require_expect(expect)
    folder = folder_of(path)
    return judge_checkpoint(folder, None if base is None else checkpoint_base(base), expect)


def checkpoint_base(base: Any) -> Base:
    """A base that adapters are compared with, built once for all of them.

    Raises:
        TypeError: It is nothing that a base can be made of.
        ValueError: It cannot be read or built, or carries adapters itself.
    """
    from pytest_lora.inspection.checkpoint.fit import Base

    return Base(base)


def judge_checkpoint(folder: Path, base: Base | None, expect: Expect) -> Report:
    """The report on one adapter folder; see ``check_checkpoint``."""
    from pytest_lora.facts.saved_config import config_of_the_file
    from pytest_lora.inspection.checkpoint import checkpoint_facts

    facts = checkpoint_facts(folder, base, read_pickle=expect.read_pickle)
    findings = list(judge([facts], expect))
    fit = facts.fit
    if fit is not None and fit.config is not None and not facts.is_foreign:
        findings += [f for f in judge([fit.config], expect) if _still_matters(f, facts, expect)]
    elif fit is None and (config := config_of_the_file(facts)) is not None:
        findings += judge([config], expect, only=OF_FILES_ALONE)
    subject = f"adapter {facts.name}"
    named = subject if fit is None else f"{subject} on {fit.base.title}"
    return Report(named, tuple(findings), checkpoint_maps(facts))


def _still_matters(finding: Finding, facts: CheckpointFacts, expect: Expect) -> bool:
    if facts.fit is None:
        return False
    if finding.code == "LORA113" and expect.will_merge:
        return facts.fit.compared
    if finding.code not in (OF_SAVED_CONFIGS if facts.fit.compared else OF_REFUSED_CONFIGS):
        return False
    # PEFT saves whole embeddings where the vocabulary was resized, whatever the configuration says.
    embeddings = facts.fit.base.input_embeddings
    return finding.code != "LORA119" or embeddings is None or not facts.holds(embeddings)
