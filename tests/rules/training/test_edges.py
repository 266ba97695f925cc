"""Rules on training at the edges of what they look for, on the facts of one training with single facts changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora import Expect, Finding
from pytest_lora.bases.examples.models import language_batch
from pytest_lora.facts.batches import AnswerFacts
from pytest_lora.facts.optimizer import ScheduleFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.probe import training_facts
from pytest_lora.rules import find
from pytest_lora.rules.training.adapter_does_not_move import HELD_UP_TO, _share_lost
from pytest_lora.rules.training.learning_rate_is_of_full_fine_tuning import MOVES_NOTHING, _needed
from pytest_lora.rules.training.learning_rate_is_too_low import _crawls
from tests.rules.training.setups import adapted


@pytest.fixture(scope="module")
def facts() -> TrainingFacts:
    """Two steps of a sound training."""
    return training_facts(adapted(), language_batch(), Plan(steps=2, rate=1e-3))


def said(name: str, facts: TrainingFacts, expect: Expect | None = None) -> list[Finding]:
    rule = find(name)
    assert rule is not None
    return list(rule(facts, expect or Expect()))


def labelled(facts: TrainingFacts, *changes: dict[str, Any]) -> TrainingFacts:
    """The facts with as many batches of labels as there are changes of the first."""
    return replace(facts, labels=tuple(replace(facts.labels[0], batch=i, **c) for i, c in enumerate(changes)))


STRANGE = {"labels": 64, "same": 0.05, "ahead": 0.05, "behind": 0.05}


def test_labels_are_of_another_text_only_where_most_batches_are_so(facts: TrainingFacts) -> None:
    rule = "labels_are_of_another_text"
    assert not said(rule, labelled(facts, STRANGE, {}))
    (found,) = said(rule, labelled(facts, STRANGE, {}, STRANGE))
    assert found.where == "batches 0, 2: labels"
    assert said(rule, labelled(facts, {**STRANGE, "labels": 8}))
    assert not said(rule, labelled(facts, {**STRANGE, "labels": 7}))
    assert not said(rule, labelled(facts, {**STRANGE, "ahead": 0.2}))


@pytest.mark.parametrize(
    ("inputs", "where", "why"),
    [
        (("input_ids", "attention_mask"), "attention_mask", "attention_mask is 1 there"),
        (("input_ids",), "input_ids", "there is no attention_mask"),
    ],
)
def test_padding_that_is_attended_to_is_told_of_the_mask_where_there_is_one(
    facts: TrainingFacts, inputs: tuple[str, ...], where: str, why: str
) -> None:
    padded = labelled(replace(facts, inputs=inputs), {"attended_padding": 2, "padded_at": "right"})
    (found,) = said("padding_is_attended_to", padded)
    assert found.where.endswith(f": {where}")
    assert why in found.observed


@pytest.mark.parametrize(
    ("dtype", "scale", "expected"), [("bfloat16", 1.0, 0.5), ("float16", 1.0, 0.0), ("bfloat16", 0.0, 0.0)]
)
def test_the_share_lost_in_rounding_is_that_of_bfloat16(
    facts: TrainingFacts, dtype: str, scale: float, expected: float
) -> None:
    tensor = replace(facts.tensors[0], dtype=dtype, scale=scale)
    assert _share_lost(tensor, 3**0.5 / 2 / HELD_UP_TO) == pytest.approx(expected)


def scheduled(facts: TrainingFacts, ends: int | None, taken: int, **changes: Any) -> TrainingFacts:
    """The facts with a schedule that gave no rate to any step."""
    schedule = ScheduleFacts(
        "LambdaLR", taken, peak=1e-3, not_before=None, ends=ends, warm_up=None, planned=None, drives=True
    )
    steps = tuple(replace(step, rates=tuple(0.0 for _ in step.rates)) for step in facts.steps)
    return replace(facts, schedule=schedule, steps=steps, **changes)


@pytest.mark.parametrize(
    ("ends", "taken", "severity", "words"),
    [
        (None, 50, "info", "has come to its end after 50 steps"),
        (50, 50, "info", "has come to its end after 50 steps"),
        (1, 50, "info", "has come to its end after 50 steps"),
        (51, 50, "error", "(step 50, zero from step 51 on)"),
        (0, 50, "error", "(step 50, zero from step 0 on)"),
        (None, 1, "error", "(step 1)"),
    ],
)
def test_a_rate_of_zero_is_fine_only_where_the_schedule_has_come_to_its_end(
    facts: TrainingFacts, ends: int | None, taken: int, severity: str, words: str
) -> None:
    (found,) = said("learning_rate_is_zero", scheduled(facts, ends, taken))
    assert found.severity == severity
    assert words in found.observed


def test_the_rate_that_is_asked_for_reaches_twice_what_moves_something() -> None:
    assert _needed(1e-6, MOVES_NOTHING / 4) == pytest.approx(8e-6)


@pytest.mark.parametrize(("still", "told"), [(3, True), (2, False), (1, False), (0, False)])
def test_positions_do_not_count_where_most_rows_stand_still(
    facts: TrainingFacts, still: int, told: bool
) -> None:
    changed = labelled(facts, {"rows": 4, "still_positions": still})
    assert bool(said("positions_do_not_count", changed)) == told


@pytest.mark.parametrize(
    ("kind", "outside", "words"),
    [
        ("causal", (-5,), "ignore with -100"),
        ("causal", (-5, 200), "model.resize_token_embeddings(201)"),
        ("classes", (7,), "set num_labels to their number"),
        ("classes", (-5,), "ignore with -100"),
    ],
)
def test_labels_that_are_no_token_ask_for_another_vocabulary_only_above_it(
    facts: TrainingFacts, kind: str, outside: tuple[int, ...], words: str
) -> None:
    changed = labelled(facts, {"kind": kind, "outside": outside, "limit": 128})
    (found,) = said("label_is_outside_the_vocabulary", changed)
    assert words in found.fix


@pytest.mark.parametrize(("loss", "crawls"), [(0.05, False), (0.06, True)])
def test_a_loss_near_zero_has_nowhere_to_crawl(facts: TrainingFacts, loss: float, crawls: bool) -> None:
    steps = tuple(replace(step, loss=loss, gradient_norm=1e-3) for step in facts.steps)
    plain = replace(facts, steps=steps, optimizer=replace(facts.optimizer, optimizer="SGD"))
    assert _crawls(plain, 1e-6) == crawls
    assert not _crawls(replace(facts, steps=steps), 1e-6)


def test_a_gradient_that_is_not_finite_is_told_though_the_loss_is(facts: TrainingFacts) -> None:
    steps = (facts.steps[0], replace(facts.steps[1], gradient_norm=math.inf))
    (found,) = said("training_is_not_finite", replace(facts, steps=steps))
    assert (found.where, found.fix) == (
        "step 2, batch 0",
        "lower the learning rate, and clip gradients at 1.0",
    )
    steps = (replace(facts.steps[0], loss=math.nan), facts.steps[1])
    (at_once,) = said("training_is_not_finite", replace(facts, steps=steps))
    assert at_once.fix.startswith("look at this batch")  # no rate has done anything yet
    assert found.observed.startswith("a gradient is NaN or infinite although the loss is not")
    assert not said("training_is_not_finite", facts)


@pytest.mark.parametrize(
    ("rate", "known_as"), [(5e-5, "TrainingArguments"), (2e-5, "TRL's SFTConfig"), (2e-4, ""), (3e-5, "")]
)
def test_the_defaults_of_full_fine_tuning_are_known(facts: TrainingFacts, rate: float, known_as: str) -> None:
    steps = tuple(replace(step, loss=4.0, rates=tuple(rate for _ in step.rates)) for step in facts.steps)
    groups = tuple(replace(group, initial_lr=rate) for group in facts.optimizer.groups)
    given = replace(
        facts, steps=steps, optimizer=replace(facts.optimizer, groups=groups), optimizer_given=True
    )
    found = said("learning_rate_is_of_full_fine_tuning", given)
    assert len(found) == bool(known_as)
    assert all(known_as in one.observed for one in found)


@pytest.mark.parametrize(("same", "told"), [(0.49, True), (0.5, False), (0.95, False)])
def test_labels_of_a_text_that_repeats_itself_are_not_shifted(
    facts: TrainingFacts, same: float, told: bool
) -> None:
    changed = labelled(facts, {"labels": 64, "same": same, "ahead": 0.95, "behind": 0.1})
    assert bool(said("labels_are_shifted_twice", changed)) == told


@pytest.mark.parametrize(
    ("eps", "norm", "severity"),
    [(1e-8, 1.0, "warning"), (1e-4, 1.0, ""), (1e-4, math.nan, "error"), (1e-8, math.nan, "error")],
)
def test_float16_under_adam_breaks_by_its_eps_or_has_broken(
    facts: TrainingFacts, eps: float, norm: float, severity: str
) -> None:
    tensors = tuple(replace(tensor, dtype="float16", held=True) for tensor in facts.tensors)
    groups = tuple(replace(group, eps=eps) for group in facts.optimizer.groups)
    steps = tuple(replace(step, gradient_norm=norm) for step in facts.steps)
    optimizer = replace(facts.optimizer, groups=groups)
    found = said(
        "float16_weights_under_adam", replace(facts, tensors=tensors, steps=steps, optimizer=optimizer)
    )
    assert [one.severity for one in found] == [severity] * bool(severity)


@pytest.mark.parametrize(
    ("same", "rows", "is_told"), [(2, 8, True), (2, 9, False), (0, 8, False), (8, 8, True)]
)
def test_a_quarter_of_the_pairs_that_are_the_same_is_told(
    facts: TrainingFacts, same: int, rows: int, is_told: bool
) -> None:
    answers = tuple(AnswerFacts(at, "chosen_labels", rows, 0, same) for at in range(3))
    found = said("answers_are_the_same", replace(facts, answers=answers))
    words = f"{3 * same} of {3 * rows} pairs are the same tokens"
    assert [one.observed.partition(":")[0] for one in found] == [words] * is_told


@pytest.mark.parametrize(("empty", "is_told"), [(2, True), (1, False)])
@pytest.mark.parametrize("named", ["chosen_labels", "completion_mask"])
def test_a_quarter_of_the_answers_without_a_token_that_counts_are_told(
    facts: TrainingFacts, named: str, empty: int, is_told: bool
) -> None:
    answers = AnswerFacts(0, named, 8, empty, 0), AnswerFacts(0, "other_mask", 8, 0, 0)
    found = said("labels_are_all_ignored", replace(facts, answers=answers))
    assert [(one.where, one.severity) for one in found] == [(named, "warning")] * is_told
    alone = replace(facts, answers=(AnswerFacts(0, named, 1, 1, 0),))
    assert not said("labels_are_all_ignored", alone)


@pytest.mark.parametrize(
    ("ends", "total", "is_told"),
    [
        (80, 100, True),
        (81, 100, False),
        (16, 20, True),
        (10, 19, False),
        (None, 100, False),
        (80, None, False),
    ],
)
def test_a_rate_that_is_zero_for_a_fifth_of_the_run_is_told(
    facts: TrainingFacts, ends: int | None, total: int | None, is_told: bool
) -> None:
    schedule = ScheduleFacts(
        "LambdaLR", 2, peak=1e-3, not_before=None, ends=ends, warm_up=None, planned=None, drives=True
    )
    found = said("learning_rate_is_zero", replace(facts, schedule=schedule, total_steps=total))
    words = f"the learning rate is 0 from step {ends} on, in a run of {total}"
    assert [one.observed.partition(":")[0] for one in found] == [words] * is_told


def test_zero_losses_of_a_single_row_ask_for_more_rows(facts: TrainingFacts) -> None:
    steps = tuple(replace(step, loss=0.0, gradient_norm=0.0) for step in facts.steps)
    zero = replace(facts, steps=steps, custom_loss=True)
    for rows, needs_two in ((1, True), (2, False)):
        (found,) = said("loss_is_exactly_zero", replace(zero, rows=rows))
        assert ("two rows at least" in found.fix) is needs_two
    (plain,) = said("loss_is_exactly_zero", replace(zero, rows=1, custom_loss=False))
    assert "two rows" not in plain.fix


@pytest.mark.parametrize(
    ("by", "fix"),
    [
        ("attention_mask", "ignore it: batch['labels'][batch['attention_mask'] == 0] = -100"),
        (
            "pad_token_id",
            "ignore it: batch['labels'][batch['input_ids'] == model.config.pad_token_id] = -100",
        ),
    ],
)
def test_padding_is_ignored_by_what_tells_it(facts: TrainingFacts, by: str, fix: str) -> None:
    whole = {"labels": 10, "padding": 0, "padding_by": by, "unlabelled": False}
    (found,) = said("padding_is_in_the_loss", labelled(facts, whole, {**whole, "padding": 3}))
    assert found.fix.startswith(fix)
    assert found.observed.endswith("3 of 20 positions in the loss (15 %) are padding")
    all_of_it = said("padding_is_in_the_loss", labelled(facts, {**whole, "padding": 10}))
    assert all_of_it[0].fix.startswith("ignore it") is (by != "attention_mask")


def test_where_no_group_holds_lora_b_that_of_lora_a_decides(facts: TrainingFacts) -> None:
    (group,) = facts.optimizer.groups
    groups = tuple(replace(group, index=i, parts=parts) for i, parts in enumerate((("a",), ("saved",))))
    optimizer = replace(facts.optimizer, groups=groups)
    for low, is_told in ((0, True), (1, False)):
        rates = tuple(1e-9 if i == low else 1e-3 for i in range(2))
        steps = tuple(replace(step, rates=rates) for step in facts.steps)
        found = said("learning_rate_is_too_low", replace(facts, optimizer=optimizer, steps=steps))
        words = "a learning rate of 1e-09: the adapter hardly moves"
        assert [one.observed for one in found] == [words] * is_told
