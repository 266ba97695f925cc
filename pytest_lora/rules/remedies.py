"""What several rules advise, in the same words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_lora.expect import Expect

START_FRESH = "start fresh with this configuration, or go on with that of the checkpoint"


def lower_rate(learning_rate: float | None, divisor: int) -> str:
    """Advice to divide the learning rate, which is named where it is known."""
    if not learning_rate:
        return f"divide the learning rate by {divisor}"
    return f"lower the learning rate from {learning_rate:g} to {learning_rate / divisor:.2g}"


def double_rank(expect: Expect) -> str:
    """Advice to double the rank and alpha with it, both named where the configuration is known."""
    config: Any = expect.config
    if config is None:
        return "double the rank and lora_alpha with it"
    rank, alpha = config.r, config.lora_alpha
    return f"double the rank from {rank} to {2 * rank} and lora_alpha with it from {alpha:g} to {2 * alpha:g}"
