"""Refuses arguments: the one place that checks types, ranges and forms, and names the argument that is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pytest_lora.expect import Expect


def require_at_least(name: str, value: Any, *, least: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be a finite number of at least {least:g}, not {value!r}")


def require_steps(steps: Any) -> None:
    """Raise unless ``steps`` is a whole number of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be a whole number, not {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")


def require_trainers(optimizer: Any, scheduler: Any, scaler: Any, loss_fn: Any) -> None:
    """Raise where one of these is nothing of its kind."""
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler must be a learning-rate scheduler, not {type(scheduler).__name__}")
    if scheduler is not None and optimizer is None:
        raise ValueError("scheduler needs the optimizer whose learning rate it sets; give optimizer too")
    if scaler is not None and not callable(getattr(scaler, "unscale_", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be called with a model and a batch; {type(loss_fn).__name__} cannot be"
        )


def require_norm(norm: Any) -> None:
    if norm is None:
        return
    if isinstance(norm, bool) or not isinstance(norm, (int, float)):
        raise TypeError(f"max_grad_norm must be a number, not {norm!r}")
    if math.isnan(norm) or norm < 0:
        raise ValueError(f"max_grad_norm must not be negative, got {norm!r}")


def require_history(history: Any) -> tuple[float, ...]:
    if history is None:
        return ()
    if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Iterable):
        raise TypeError(f"history must be a sequence of losses, not {type(history).__name__}")
    try:
        return tuple(float(loss) for loss in history)
    except (TypeError, ValueError) as error:
        raise TypeError(f"history must hold numbers: {error}") from error


def require_snapshot(snapshot: Any) -> Mapping[str, Any] | None:
    if snapshot is not None and not isinstance(snapshot, Mapping):
        raise TypeError(
            f"base_snapshot must map names to tensors, as state_dict() does, not {type(snapshot).__name__}"
        )
    return snapshot


def require_expect(expect: Any) -> Expect:
    """What is meant, the defaults for None; raise where it is something else."""
    if expect is None:
        return Expect()
    if not isinstance(expect, Expect):
        raise TypeError(f"expect must be an Expect, not {type(expect).__name__}")
    return expect
