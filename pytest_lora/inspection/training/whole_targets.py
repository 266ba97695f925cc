"""Whole numbers as labels of a classifier with one output, as facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.batches import WholeTargets


def whole_targets(batches: tuple[Any, ...], root: nn.Module, base: BaseFacts) -> Iterator[WholeTargets]:
    """Batches whose labels transformers takes for numbers, as there is one output, though their dtype is whole.

    A ``problem_type`` that is set says what the labels are. transformers sets it itself at the first loss; a check
    before that run sees it unset.
    """
    config: Any = getattr(root, "config", None)
    one_output = base.task_type == "SEQ_CLS" and getattr(config, "num_labels", None) == 1
    if not one_output or getattr(config, "problem_type", None) is not None:
        return
    for index, batch in enumerate(batches):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.device.type == "meta" or not labels.numel():
            continue
        if not labels.is_floating_point() and not labels.is_complex():
            yield WholeTargets(
                index, len(labels), tuple(sorted({int(value) for value in labels.flatten().tolist()}))
            )
