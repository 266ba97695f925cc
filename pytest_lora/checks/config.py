"""A configuration against its base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pytest_lora.arguments import adapter_and_base, refusing, require_expect
from pytest_lora.checks import report_on
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.adapter_maps import config_maps
from pytest_lora.facts.measures import of_config
from pytest_lora.findings import Report
from pytest_lora.rules.selection import codes

if TYPE_CHECKING:
    import os

    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig


@refusing
def check_config(
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge a ``LoraConfig`` against the base it is for, before anything is built or trained.

    PEFT itself puts the adapter on a copy of the base's structure on the meta device: no weights are read
    but those of a task head, nothing is changed, and what PEFT refuses becomes a finding.

    Args:
        config: The configuration; it is not changed.
        base: A live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report with the rules of the stage *config* (codes 1xx), and with ``expect.serve`` those on servers (LORA461
        to LORA464).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base cannot be read or built, or a code does not exist.
    """
    from pytest_lora.inspection.config import config_facts

    config, base = adapter_and_base(config, base)
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    facts = config_facts(config, base)
    subject = f"LoraConfig on {facts.base.title}"
    judged: list[object] = [facts]
    if expect.serve is not None:
        from pytest_lora.facts.served import served_config  # most adapters are judged without a server

        judged.append(served_config(facts))
    return report_on(subject, judged, expect, select, ignore, config_maps(facts), of_config(facts))
