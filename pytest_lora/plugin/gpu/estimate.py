"""What the memory estimate says of a GPU test, where its fixtures hold a model with an adapter and a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_lora.plugin.gpu.run import PREDICTION, Prediction

if TYPE_CHECKING:
    import pytest

    from pytest_lora.facts.memory import MemoryEstimate
    from pytest_lora.findings import Report


def predict(item: pytest.Item) -> None:
    """Leave a prediction in the test's stash, unless somebody else has or nothing is known."""
    if PREDICTION in item.stash:
        return
    estimate = _estimated(item)
    if estimate is not None:
        item.stash[PREDICTION] = Prediction(estimate.peak_allocated, dict(estimate.breakdown))


def explained(item: pytest.Item, budget: int) -> str:
    """The estimate of a test that ran out of memory, and what would fit ``budget`` bytes; empty if unknown."""
    estimate = _estimated(item)
    if estimate is None:
        return ""
    from pytest_lora.checks.memory import judge_memory

    model, _ = _known(item)
    report: Report = judge_memory(model, estimate, budget)
    return "\n".join((str(estimate), *(str(finding) for finding in report.errors)))


def _estimated(item: pytest.Item) -> MemoryEstimate | None:
    """What is wrong with the estimate is not what is wrong with the test."""
    model, batch = _known(item)
    if model is None or batch is None:
        return None
    from pytest_lora.memory.estimate import estimate_of_model

    try:
        return estimate_of_model(model, batch)
    except (TypeError, ValueError):
        return None


def _known(item: pytest.Item) -> tuple[Any, Any]:
    """The first fixture value that is a model with an adapter, and the first that is a batch."""
    values = list(getattr(item, "funcargs", {}).values())
    model = next((v for v in values if hasattr(v, "peft_config") and hasattr(v, "parameters")), None)
    batch = next((v for v in values if isinstance(v, Mapping) and "input_ids" in v), None)
    return model, batch
