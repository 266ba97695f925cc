"""What the rows of batches show while no step is taken, as facts: chosen and rejected answers, tokens whose row of the
vocabulary is zero, whole numbers as labels of one output; and the rows of somebody else's run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.batches import IGNORED, AnswerFacts, WholeTargets
from pytest_lora.facts.optimizer import OptimizerFacts
from pytest_lora.facts.steps import EmptyRows
from pytest_lora.facts.training import Objective, TrainingFacts
from pytest_lora.inspection.base_values import readable_weight
from pytest_lora.inspection.behaviour.texts import pad_token
from pytest_lora.inspection.model import adapted_survey, model_facts
from pytest_lora.inspection.training.circumstances import spoiled_inputs
from pytest_lora.inspection.training.labels import label_facts
from pytest_lora.inspection.training.media import medium_facts
from pytest_lora.inspection.training.special_tokens import vocabulary

_SIDES = ("chosen", "rejected")

_MASK = "completion_mask"
"""What TRL calls the mask of answers among ``input_ids``; that of sampled answers alone, beside ``completion_ids``, may
leave out whole rows on purpose (``mask_truncated_completions``)."""

_IDS = ("{}_input_ids", "{}_ids", "{}")
"""What the tokens of chosen answers are called."""


def answer_facts(batches: tuple[Any, ...]) -> Iterator[AnswerFacts]:
    """Facts on each batch of answers whose form is known."""
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            continue
        found = (
            *(_rows(batch.get(f"{side}_labels")) for side in _SIDES),
            *(_ids(batch, side) for side in _SIDES),
        )
        pairs = [rows for rows in found if rows is not None]
        mask, texts = _rows(batch.get(_MASK)), _rows(batch.get("input_ids"))
        if len(pairs) == len(found):
            yield _pairs(index, *pairs)
        elif mask is not None and texts is not None and mask.shape == texts.shape:
            yield AnswerFacts(index, _MASK, len(mask), int((~mask.bool().any(dim=1)).sum()), 0)


def _pairs(
    index: int, chosen: Tensor, rejected: Tensor, chosen_ids: Tensor, rejected_ids: Tensor
) -> AnswerFacts:
    rows = min(len(chosen), len(rejected))
    counted = [(labels[:rows, 1:] != IGNORED).any(dim=1) for labels in (chosen, rejected)]
    same = torch.zeros(rows, dtype=torch.bool)
    if chosen_ids.shape == rejected_ids.shape and chosen.shape == rejected.shape == chosen_ids.shape:
        same = ((chosen_ids == rejected_ids) & (chosen == rejected)).all(dim=1) & counted[0].cpu()
    empty = ~(counted[0] & counted[1])
    return AnswerFacts(index, "chosen_labels, rejected_labels", rows, int(empty.sum()), int(same.sum()))


def _ids(batch: Mapping[str, Any], side: str) -> Tensor | None:
    found = (_rows(batch.get(name.format(side))) for name in _IDS)
    return next((ids for ids in found if ids is not None), None)


def _rows(value: Any) -> Tensor | None:
    fits = isinstance(value, Tensor) and value.ndim == 2 and len(value) > 0 and not value.is_meta
    return value.cpu() if fits and not value.is_floating_point() else None


def empty_rows(
    batches: tuple[Any, ...], modules: Mapping[str, nn.Module], base: BaseFacts, padding: int | None
) -> Iterator[EmptyRows]:
    """Rows of zeros of the input embedding that some text reads, and of the head that some label aims at.

    ``padding`` is no such token, as embeddings keep its row at zero (``padding_idx``).
    """
    read, aimed = _used(batches, padding)
    sides = (base.input_embeddings, read), (base.output_embeddings, aimed)
    for name, tokens in sides:
        weight = readable_weight(modules.get(name or ""))
        if name is None or weight is None:
            continue
        kept_at_zero = getattr(modules[name], "padding_idx", None)
        rows = sorted(token for token in tokens - {kept_at_zero} if 0 <= token < len(weight))
        if not rows:
            continue
        zero = ~weight[torch.tensor(rows, device=weight.device, dtype=torch.long)].any(dim=1)
        empty = tuple(token for token, is_zero in zip(rows, zero.tolist(), strict=True) if is_zero)
        # All rows zero: a model of which only shapes matter.
        if empty and len(empty) < len(rows):
            yield EmptyRows(module=name, tokens=empty)


def _used(batches: tuple[Any, ...], padding: int | None) -> tuple[set[int], set[int]]:
    read: set[int] = set()
    aimed: set[int] = set()
    for batch in batches:
        if not isinstance(batch, Mapping):
            continue
        ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_meta:
            continue
        seen = (
            mask.bool()
            if isinstance(mask, Tensor) and mask.shape == ids.shape
            else torch.ones_like(ids).bool()
        )
        read |= set(ids[seen].tolist())
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            aimed |= set(labels[labels != IGNORED].tolist())
    return read - {padding}, aimed - {padding}


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


def row_facts(
    model: nn.Module, batches: tuple[Any, ...], objective: Objective, *, custom_loss: bool
) -> TrainingFacts:
    """What batches hold that a model is trained on; nothing is run, drawn or changed.

    Raises:
        TypeError: The model carries no LoRA layers.
    """
    found, facts = adapted_survey(model), model_facts(model)
    return TrainingFacts(
        model=facts,
        optimizer=OptimizerFacts(optimizer="", held=(), missing=(), frozen=0, foreign=0, groups=()),
        optimizer_given=False,
        schedule=None,
        max_grad_norm=None,
        scaler=False,
        custom_loss=custom_loss,
        steps=(),
        tensors=(),
        untouched=(),
        labels=tuple(label_facts(batches, vocabulary(found.root, facts.base))),
        batches=len(batches),
        inputs=tuple(dict.fromkeys(name for batch in batches for name in batch)),
        history=(),
        changes=(),
        dropouts=(),
        repacked=(),
        spoiled=tuple(spoiled_inputs(batches)),
        objective=objective,
        media=tuple(medium_facts(batches, found.root)),
        empty_rows=tuple(empty_rows(batches, found.modules, facts.base, pad_token(found.root))),
        answers=tuple(answer_facts(batches)),
        whole_targets=tuple(whole_targets(batches, found.root, facts.base)),
    )
