"""Whether a loss compares labels with the logits before them or with those at their own place, as facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.batches import COPIED, IGNORED, LabelFacts
from pytest_lora.facts.steps import ShiftFacts


class Shift:
    """Sees the logits that a model gives while one loss is made, and compares them with that loss."""

    def __init__(self, root: nn.Module) -> None:
        """Begin to look; the hook goes where the keeper puts back all hooks."""
        self._calls = 0
        self._logits: Tensor | None = None
        self._handle = root.register_forward_hook(self._note)

    def _note(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._calls += 1
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        self._logits = logits.detach() if isinstance(logits, Tensor) and logits.ndim == 3 else None

    def compared(
        self, loss: Tensor, batch: Any, labelled: tuple[LabelFacts, ...], index: int
    ) -> ShiftFacts | None:
        """End to look; None where the model was called more than once, or its labels are no copy of its input."""
        self._handle.remove()
        known = next((k for k in labelled if k.batch == index), None)
        logits, self._logits = self._logits, None
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if (
            known is None
            or known.kind != "causal"
            or max(known.same, known.ahead) < COPIED
            or self._calls != 1
        ):
            return None
        if logits is None or labels is None or logits.shape[:2] != labels.shape or logits.shape[1] < 2:
            return None
        labels = labels.to(logits.device)
        in_place, ahead = _mean(logits, labels), _mean(logits[:, :-1], labels[:, 1:])
        if in_place is None or ahead is None:
            return None
        return ShiftFacts(loss=float(loss.detach()), in_place=in_place, ahead=ahead)


def _mean(logits: Tensor, labels: Tensor) -> float | None:
    """The mean cross-entropy, row by row, as all logits in float32 may not fit beside the model."""
    total, number = 0.0, 0
    with torch.no_grad():
        for row, aims in zip(logits, labels, strict=True):
            counted = aims != IGNORED
            if counted.any():
                total += float(
                    nn.functional.cross_entropy(row[counted].float(), aims[counted], reduction="sum")
                )
                number += int(counted.sum())
    return total / number if number else None
