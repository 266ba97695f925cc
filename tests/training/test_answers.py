"""Chosen and rejected answers, as facts and judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_lora import Expect
from pytest_lora.facts.batches import AnswerFacts
from pytest_lora.inspection.training.rows import answer_facts
from pytest_lora.rules.training.answers_are_the_same import answers_are_the_same
from pytest_lora.rules.training.labels_are_all_ignored import labels_are_all_ignored

N = -100


def answers(chosen: list[list[int]], rejected: list[list[int]], **names: str) -> dict[str, Tensor]:
    """Prompts of two tokens, each with an answer of three; 0 is cut off."""
    ids = [torch.tensor([[8, 9, *row] for row in rows]) for rows in (chosen, rejected)]
    labels = [tokens.masked_fill((tokens == 0) | (torch.arange(5) < 2), N) for tokens in ids]
    called = names.get("ids", "{}_input_ids")
    return {
        **{called.format(side): tokens for side, tokens in zip(("chosen", "rejected"), ids, strict=True)},
        **{f"{side}_labels": rows for side, rows in zip(("chosen", "rejected"), labels, strict=True)},
    }


def found(batch: Any) -> tuple[int, int, int]:
    (facts,) = answer_facts((batch,))
    return facts.rows, facts.empty, facts.same


@pytest.mark.parametrize("ids", ["{}_input_ids", "{}_ids", "{}"])
def test_pairs_are_counted(ids: str) -> None:
    assert found(answers([[1, 2, 3], [4, 5, 6]], [[1, 2, 4], [4, 5, 7]], ids=ids)) == (2, 0, 0)
    assert found(answers([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 7]], ids=ids)) == (2, 0, 1)
    assert found(answers([[0, 0, 0], [4, 5, 6]], [[1, 2, 3], [4, 5, 7]], ids=ids)) == (2, 1, 0)
    assert found(answers([[0, 0, 0]], [[0, 0, 0]], ids=ids)) == (1, 1, 0), "cut off is not the same"


def test_masks_of_answers_and_what_is_none() -> None:
    mask = torch.tensor([[0, 1], [0, 0], [1, 1]])
    assert found({"completion_mask": mask, "input_ids": torch.ones(3, 2).long()}) == (3, 1, 0)
    sampled = {"completion_mask": mask, "completion_ids": torch.ones(3, 2).long()}
    assert not list(answer_facts((sampled,))), "answers that were cut off may be left out on purpose"
    assert not list(
        answer_facts(({"completion_mask": torch.zeros(3)}, {"labels": torch.zeros(2, 2).long()}, [1]))
    )
    without_labels = {k: v for k, v in answers([[1, 2, 3]], [[1, 2, 3]]).items() if "labels" not in k}
    assert not list(answer_facts((without_labels,)))


class Facts:
    labels = ()

    def __init__(self, *answers: AnswerFacts) -> None:
        self.answers = answers


@pytest.mark.parametrize(
    ("rule", "empty", "same", "told"),
    [
        (labels_are_all_ignored, 2, 0, True),
        (labels_are_all_ignored, 1, 0, False),
        (labels_are_all_ignored, 0, 8, False),
        (answers_are_the_same, 0, 2, True),
        (answers_are_the_same, 0, 1, False),
        (answers_are_the_same, 8, 0, False),
    ],
)
def test_from_a_quarter_of_the_rows_on(rule: Any, empty: int, same: int, told: bool) -> None:
    facts = Facts(
        AnswerFacts(0, "completion_mask", 4, empty, same), AnswerFacts(1, "completion_mask", 4, 0, 0)
    )
    violations = list(rule(facts, Expect()))
    assert bool(violations) is told
    if told:
        assert "2 of 8" in violations[0].observed
