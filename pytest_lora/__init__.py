"""Tests for LoRA and QLoRA set-ups: inspected into plain facts, judged by rules, reported by pytest.

Public names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_lora.assertions import LoraHealthError as LoraHealthError
    from pytest_lora.assertions import assert_adapter_shapes as assert_adapter_shapes
    from pytest_lora.assertions import assert_alpha_ratio as assert_alpha_ratio
    from pytest_lora.assertions import assert_checkpoint_healthy as assert_checkpoint_healthy
    from pytest_lora.assertions import assert_config_healthy as assert_config_healthy
    from pytest_lora.assertions import assert_fits_memory as assert_fits_memory
    from pytest_lora.assertions import assert_lora_healthy as assert_lora_healthy
    from pytest_lora.assertions import assert_lora_laws as assert_lora_laws
    from pytest_lora.assertions import assert_loss_decreases as assert_loss_decreases
    from pytest_lora.assertions import assert_merge_exact as assert_merge_exact
    from pytest_lora.assertions import assert_param_ratio as assert_param_ratio
    from pytest_lora.assertions import assert_reload_exact as assert_reload_exact
    from pytest_lora.assertions import assert_resumable as assert_resumable
    from pytest_lora.callback import LoraHealthCallback as LoraHealthCallback
    from pytest_lora.checks import check_checkpoint as check_checkpoint
    from pytest_lora.checks import check_config as check_config
    from pytest_lora.checks import check_loss_decreases as check_loss_decreases
    from pytest_lora.checks import check_memory as check_memory
    from pytest_lora.checks import check_model as check_model
    from pytest_lora.checks import check_training as check_training
    from pytest_lora.checks import diagnose_history as diagnose_history
    from pytest_lora.counting import ParameterCount as ParameterCount
    from pytest_lora.counting import RankRow as RankRow
    from pytest_lora.counting import RankTable as RankTable
    from pytest_lora.counting import count_parameters as count_parameters
    from pytest_lora.counting import rank_table as rank_table
    from pytest_lora.distributed import RanksFailedError as RanksFailedError
    from pytest_lora.distributed import assert_adapters_in_sync as assert_adapters_in_sync
    from pytest_lora.distributed import run_distributed as run_distributed
    from pytest_lora.expect import Expect as Expect
    from pytest_lora.facts.memory import MemoryEstimate as MemoryEstimate
    from pytest_lora.facts.training import LossDrop as LossDrop
    from pytest_lora.findings import Finding as Finding
    from pytest_lora.findings import LoraHealthWarning as LoraHealthWarning
    from pytest_lora.findings import Report as Report
    from pytest_lora.frontier import FrontierRow as FrontierRow
    from pytest_lora.frontier import OomFrontier as OomFrontier
    from pytest_lora.frontier import largest_that_fits as largest_that_fits
    from pytest_lora.frontier import oom_frontier as oom_frontier
    from pytest_lora.memory import StepMemory as StepMemory
    from pytest_lora.memory import estimate_memory as estimate_memory
    from pytest_lora.memory import step_memory as step_memory
    from pytest_lora.sweep.advice import RankAdvice as RankAdvice
    from pytest_lora.sweep.advice import suggest_rank as suggest_rank
    from pytest_lora.sweep.choice import RankChoice as RankChoice
    from pytest_lora.sweep.gate import assert_rank_suffices as assert_rank_suffices
    from pytest_lora.sweep.result import SweepResult as SweepResult
    from pytest_lora.sweep.runner import rank_sweep as rank_sweep
    from pytest_lora.watch import watch_training as watch_training

_HOMES = {
    "Expect": "expect",
    "Finding": "findings",
    "FrontierRow": "frontier",
    "LoraHealthCallback": "callback",
    "LoraHealthError": "assertions",
    "LoraHealthWarning": "findings",
    "MemoryEstimate": "facts.memory",
    "OomFrontier": "frontier",
    "ParameterCount": "counting",
    "RankAdvice": "sweep.advice",
    "RankChoice": "sweep.choice",
    "RankRow": "counting",
    "RankTable": "counting",
    "LossDrop": "facts.training",
    "RanksFailedError": "distributed",
    "Report": "findings",
    "StepMemory": "memory",
    "SweepResult": "sweep.result",
    "assert_adapter_shapes": "assertions",
    "assert_adapters_in_sync": "distributed",
    "assert_alpha_ratio": "assertions",
    "assert_checkpoint_healthy": "assertions",
    "assert_config_healthy": "assertions",
    "assert_fits_memory": "assertions",
    "assert_lora_healthy": "assertions",
    "assert_lora_laws": "assertions",
    "assert_loss_decreases": "assertions",
    "assert_merge_exact": "assertions",
    "assert_param_ratio": "assertions",
    "assert_rank_suffices": "sweep.gate",
    "assert_reload_exact": "assertions",
    "assert_resumable": "assertions",
    "check_checkpoint": "checks",
    "check_config": "checks",
    "check_loss_decreases": "checks",
    "check_memory": "checks",
    "check_model": "checks",
    "check_training": "checks",
    "count_parameters": "counting",
    "diagnose_history": "checks",
    "estimate_memory": "memory",
    "largest_that_fits": "frontier",
    "oom_frontier": "frontier",
    "rank_sweep": "sweep.runner",
    "rank_table": "counting",
    "run_distributed": "distributed",
    "step_memory": "memory",
    "suggest_rank": "sweep.advice",
    "watch_training": "watch",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
