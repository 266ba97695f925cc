"""The fixture ``lora_rank_sweep``: a sweep whose base, adapter and ranks are those of the test."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from pytest_lora.plugin import lora_settings
from pytest_lora.plugin.session_options import options_of
from pytest_lora.sweep.runner import rank_sweep

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest
    from peft import LoraConfig
    from torch import nn

    from pytest_lora.sweep.result import SweepResult


def sweeper(node: pytest.Item, base: nn.Module, config: LoraConfig) -> Callable[..., SweepResult]:
    """``rank_sweep`` with the base copied for every trial; keywords of the caller go first."""

    fitted = lora_settings.fitted(config, base, node)

    def sweep(train: Any, evaluate: Any, **settings: Any) -> SweepResult:
        defaults: dict[str, Any] = {
            "ranks": options_of(node.config).ranks,
            "config": fitted,
            "progress": False,
        }
        return rank_sweep(lambda: copy.deepcopy(base), train, evaluate, **defaults | settings)

    return sweep
