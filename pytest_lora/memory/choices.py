"""Choices about a step, checked: an evaluation beside it, and whose loss and kernels run."""

from __future__ import annotations

from typing import Any

from pytest_lora.facts.memory_choices import KERNELS, LOSSES, Evaluation, Kernels, Loss
from pytest_lora.values import require_one_of, shown


def checked_kernels(given: Any) -> Kernels | None:
    if given is not None:
        require_one_of("kernels", given, KERNELS)
    found: Kernels | None = given
    return found


def checked_evaluation(given: Any, *, sharded: bool) -> Evaluation | None:
    if given is None:
        return None
    if not isinstance(given, Evaluation):
        raise TypeError(f"evaluation must be an Evaluation(batch_size=...) or None, not {shown(given)}")
    if sharded:
        raise ValueError(
            "evaluation: it is not predicted where weights are cut over several GPUs; leave it out, and give it for "
            "one GPU or strategy='ddp'"
        )
    return given


def checked_loss(given: Any, kernels: Any, trainer: str) -> Loss:
    if trainer.startswith("trl-"):  # Liger's layers beside TRL's own head, as TRL sets them up
        if given not in (None, "chunked"):
            raise ValueError(
                f"loss: {trainer!r} computes its own loss, in tiles of the logits; leave loss={given!r} out, or "
                "describe the step with trainer='transformers'"
            )
        return "full"
    if given is None:
        return "liger" if kernels == "liger" else "full"
    require_one_of("loss", given, LOSSES)
    found: Loss = given
    return found
