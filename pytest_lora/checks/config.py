"""A configuration against its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora.arguments import (
    require_expect,
)
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.drawing import (
    config_maps,
)
from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    import os

    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig


def check_config(
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    *,
    expect: Expect | None = None,
) -> Report:
    """Judge a ``LoraConfig`` against the base it is for, before anything is built or trained.

    PEFT itself puts the adapter on a copy of the base's structure on the meta device: no weights are read
    but those of a task head, nothing is changed, and what PEFT refuses becomes a finding.

    Args:
        config: The configuration; it is not changed.
        base: A live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.
        expect: What is meant, where only the user can know it.

    Returns:
        A report with the rules of the stage *config* (codes 1xx).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base cannot be read or built.
    """
    from pytest_lora.inspection.config import config_facts

    expect = require_expect(expect)
    facts = config_facts(config, base)
    return Report(f"LoraConfig on {facts.base.title}", tuple(judge([facts], expect)), config_maps(facts))
