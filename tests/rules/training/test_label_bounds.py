"""Each number in the rules on labels and inputs, on both sides: two sound steps with single facts changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora import Expect
from pytest_lora.bases.examples.models import language_batch
from pytest_lora.facts.batches import LabelFacts, TextBounds, WholeTargets
from pytest_lora.facts.curve_shape import LossDrop
from pytest_lora.facts.steps import ShiftFacts, TaughtFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.probe import training_facts
from tests.rules.saying import says, told
from tests.rules.training.setups import adapted
from tests.rules.training.test_bounds import changed, schedule

NONE = TextBounds(None, 0.0, 0, None, 0, 0, 0, 0, 0, 0)
LABELS = LabelFacts(
    batch=0,
    kind="causal",
    labels=100,
    total=120,
    unlabelled=0,
    rows=4,
    rows_ignored=0,
    padding=0,
    padding_by="attention_mask",
    ends=0,
    padding_ends=0,
    end_targets=0,
    limit=128,
    outside=(),
    ids_limit=128,
    ids_outside=(),
    same=1.0,
    ahead=0.0,
    behind=0.0,
    masked_inputs=False,
    attended_padding=0,
    padded_at="right",
    double_starts=0,
    still_positions=0,
    visible=0.0,
    bounds=NONE,
)


@pytest.fixture(scope="module")
def sound() -> TrainingFacts:
    return training_facts(adapted(), language_batch(), Plan(steps=2, rate=1e-3))


def known(**changes: Any) -> LabelFacts:
    bounds = {name: changes.pop(name) for name in tuple(changes) if name in TextBounds.__slots__}
    return replace(LABELS, bounds=replace(NONE, **bounds), **changes)


UNSHIFTED = ShiftFacts(4.0, 4.0, 5.0)
ANSWERS = {"expect": Expect(completion_only=True)}
OTHER_TEXT = {"same": 0.0, "ahead": 0.19, "behind": 0.0}
ENDLESS = {"finished": 2, "last_tokens": 2, "prompted": 4}

CASES: list[tuple[str, list[LabelFacts], dict[str, Any], list[str]]] = [
    ("decoder_reads_its_labels", [known(visible=0.9, labels=4)], {}, ["error: 90 % of decoder_input_ids"]),
    ("decoder_reads_its_labels", [known(visible=0.89)], {}, []),
    ("decoder_reads_its_labels", [known(visible=0.9, labels=3)], {}, []),
    ("decoder_reads_its_labels", [known(visible=0.9)], {"custom_loss": True}, []),
    (
        "decoder_starts_twice",
        [known(kind="sequence", started=4, start=5)],
        {},
        ["warning: begin with 5, decoder_start"],
    ),
    ("decoder_starts_twice", [known(kind="sequence", started=3)], {}, []),
    ("decoder_starts_twice", [known(kind="causal", started=4)], {}, []),
    ("decoder_starts_twice", [known(kind="sequence", started=4), known(kind="sequence")], {}, []),
    ("decoder_starts_twice", [known(kind="sequence", started=4)], {"inputs": ("decoder_input_ids",)}, []),
    (
        "documents_predict_each_other",
        [known(crossing=4, crossing_tokens=2)],
        {},
        ["info: 4 labels (4.0 %) are"],
    ),
    ("documents_predict_each_other", [known(crossing=4, crossing_tokens=1)], {}, []),
    ("documents_predict_each_other", [known(crossing=0, crossing_tokens=2)], {}, []),
    (
        "end_token_is_never_a_target",
        [known(ends=3)],
        {},
        ["warning: 3 sequences end with the end token (eos), and none"],
    ),
    (
        "end_token_is_never_a_target",
        [known(padding_ends=3)],
        {},
        ["info: by attention_mask it is padding there"],
    ),
    ("end_token_is_never_a_target", [known(ends=3, end_targets=1)], {}, []),
    ("end_token_is_never_a_target", [known()], {}, []),
    (
        "label_is_outside_the_vocabulary",
        [known(outside=(128,))],
        {},
        ["error: 128: outside the vocabulary of 128"],
    ),
    (
        "label_is_outside_the_vocabulary",
        [known(outside=(128,))],
        {},
        ["error: model.resize_token_embeddings(129)"],
    ),
    (
        "label_is_outside_the_vocabulary",
        [known(outside=(0,))],
        {},
        ["error: model.resize_token_embeddings(1)"],
    ),
    ("label_is_outside_the_vocabulary", [known(outside=(-1,))], {}, ["error: ignore with -100"]),
    (
        "label_is_outside_the_vocabulary",
        [known(outside=(3,), kind="classes", limit=3)],
        {},
        ["error: 3: outside the classes of 3"],
    ),
    (
        "label_is_outside_the_vocabulary",
        [known(outside=(3,), kind="tokens", limit=3)],
        {},
        ["error: numbers from 0 to 2"],
    ),
    (
        "label_is_outside_the_vocabulary",
        [known(outside=(-1,), limit=None)],
        {},
        ["error: classes, and -100 for what"],
    ),
    (
        "label_is_outside_the_vocabulary",
        [known(ids_outside=(-1,), ids_limit=None)],
        {},
        ["error: numbers of at least 0"],
    ),
    ("label_is_outside_the_vocabulary", [known()], {}, []),
    (
        "labels_are_all_ignored",
        [known(labels=0), known()],
        {},
        ["error: all labels are -100 in 1 of 2 batches"],
    ),
    (
        "labels_are_all_ignored",
        [known(labels=0), known(), known()],
        {},
        ["warning: all labels are -100 in 1 of 3"],
    ),
    ("labels_are_all_ignored", [known(labels=0, total=0)], {}, []),
    ("labels_are_all_ignored", [known(rows_ignored=1)], {}, ["warning: all labels are -100 in 1 of 4 rows"]),
    ("labels_are_all_ignored", [known(rows_ignored=1, rows=5)], {}, []),
    ("labels_are_all_ignored", [known(rows_ignored=1, rows=1)], {}, []),
    ("labels_are_all_ignored", [known(rows_ignored=1, rows=2)], {}, ["warning: 1 of 2 rows"]),
    ("labels_are_of_another_text", [known(**OTHER_TEXT, labels=8)], {}, ["warning: 0 % of the labels equal"]),
    ("labels_are_of_another_text", [known(**OTHER_TEXT, labels=7)], {}, []),
    ("labels_are_of_another_text", [known(**{**OTHER_TEXT, "ahead": 0.2})], {}, []),
    ("labels_are_of_another_text", [known(**OTHER_TEXT, kind="sequence")], {}, []),
    ("labels_are_of_another_text", [known(**OTHER_TEXT, masked_inputs=True)], {}, []),
    ("labels_are_of_another_text", [known(**OTHER_TEXT), known()], {}, []),
    ("labels_are_of_another_text", [known(**OTHER_TEXT)], {"custom_loss": True}, []),
    (
        "labels_are_shifted_twice",
        [known(same=0.4, ahead=0.9, labels=4)],
        {},
        ["error: 90 % of the labels equal the next"],
    ),
    ("labels_are_shifted_twice", [known(same=0.4, ahead=0.89)], {}, []),
    ("labels_are_shifted_twice", [known(same=0.5, ahead=0.9)], {}, []),
    ("labels_are_shifted_twice", [known(same=0.4, ahead=0.9, labels=3)], {}, []),
    (
        "labels_are_shifted_twice",
        [known(same=0.4, behind=0.9)],
        {},
        ["error: 90 % of the labels equal the previous"],
    ),
    (
        "labels_are_shifted_twice",
        [known(same=0.4, behind=0.9, ahead=0.9)],
        {},
        ["error: the next input token"],
    ),
    ("labels_are_shifted_twice", [known(same=0.4, behind=0.89)], {}, []),
    ("labels_are_shifted_twice", [known(same=0.4, ahead=0.9, kind="sequence")], {}, []),
    ("labels_are_shifted_twice", [known(same=0.4, ahead=0.9)], {"custom_loss": True}, []),
    ("labels_are_shifted_twice", [known(same=0.4, ahead=0.9)], {"shift": UNSHIFTED}, []),
    (
        "loss_is_not_shifted",
        [known(same=0.95)],
        {"shift": UNSHIFTED},
        ["error: set batch['labels'] = torch.nn"],
    ),
    (
        "loss_is_not_shifted",
        [known(same=0.95)],
        {"shift": UNSHIFTED, "custom_loss": True},
        ["error: logits[:, :-1]"],
    ),
    ("loss_is_not_shifted", [known(same=0.94)], {"shift": UNSHIFTED}, []),
    ("loss_is_not_shifted", [known(same=0.95, masked_inputs=True)], {"shift": UNSHIFTED}, []),
    ("loss_is_not_shifted", [known(same=0.95, kind="sequence")], {"shift": UNSHIFTED}, []),
    ("loss_is_not_shifted", [known(same=0.95)], {}, []),
    (
        "loss_is_not_shifted",
        [known(same=0.95)],
        {"taught": TaughtFacts(8, 0.9, 0.49, 0.0)},
        ["error: set batch"],
    ),
    ("loss_is_not_shifted", [known(same=0.95)], {"taught": TaughtFacts(7, 0.9, 0.49, 0.0)}, []),
    ("loss_is_not_shifted", [known(same=0.95)], {"taught": TaughtFacts(8, 0.89, 0.49, 0.0)}, []),
    ("loss_is_not_shifted", [known(same=0.95)], {"taught": TaughtFacts(8, 0.9, 0.5, 0.0)}, []),
    ("loss_is_not_shifted", [known(same=0.94)], {"taught": TaughtFacts(8, 0.9, 0.49, 0.0)}, []),
    (
        "labels_are_shifted_twice",
        [known()],
        {"taught": TaughtFacts(8, 0.0, 0.49, 0.9)},
        ["error: the loss of"],
    ),
    (
        "labels_are_shifted_twice",
        [known()],
        {"taught": TaughtFacts(8, 0.0, 0.49, 0.9), "custom_loss": True},
        ["error"],
    ),
    ("labels_are_shifted_twice", [known()], {"taught": TaughtFacts(8, 0.0, 0.5, 0.9)}, []),
    ("labels_are_shifted_twice", [known()], {"taught": TaughtFacts(8, 0.0, 0.49, 0.89)}, []),
    (
        "labels_are_shifted_twice",
        [known(same=0.4, ahead=0.9)],
        {"taught": TaughtFacts(8, 0.0, 0.0, 1.0)},
        ["error: they are shifted already"],
    ),
    ("padding_is_in_the_loss", [known(padding=10)], {}, ["error: (10 %) are padding"]),
    ("padding_is_in_the_loss", [known(padding=9)], {}, ["warning: (9 %) are padding"]),
    ("padding_is_in_the_loss", [known()], {}, []),
    (
        "padding_is_attended_to",
        [known(attended_padding=2)],
        {"inputs": ("attention_mask",)},
        ["warning: attention_mask is 1"],
    ),
    (
        "padding_is_attended_to",
        [known(attended_padding=2)],
        {"inputs": ()},
        ["warning: there is no attention_mask"],
    ),
    ("padding_is_attended_to", [known()], {}, []),
    ("positions_do_not_count", [known(still_positions=3)], {}, ["warning: 3 of 4"]),
    ("positions_do_not_count", [known(still_positions=2)], {}, []),
    ("positions_do_not_count", [known(still_positions=1, rows=1)], {}, ["warning: 1 of 1"]),
    ("text_begins_twice", [known(double_starts=3)], {}, ["warning: 3 of 4 rows begin with two begin tokens"]),
    ("text_begins_twice", [known(double_starts=2)], {}, []),
    ("text_begins_twice", [known(double_starts=1, rows=1)], {}, ["warning: 1 of 1"]),
    (
        "prompts_are_filled_with_a_label",
        [known(labels=8, filled=0.1, same=0.85, filler=0)],
        {},
        ["warning: the one token 0"],
    ),
    (
        "prompts_are_filled_with_a_label",
        [known(labels=8, filled=0.85, same=0.1, filler=0)],
        {},
        ["warning: the one token 0"],
    ),
    ("prompts_are_filled_with_a_label", [known(labels=7, filled=0.5, same=0.5)], {}, []),
    ("prompts_are_filled_with_a_label", [known(filled=0.09, same=0.9)], {}, []),
    ("prompts_are_filled_with_a_label", [known(filled=0.9, same=0.09)], {}, []),
    ("prompts_are_filled_with_a_label", [known(filled=0.5, same=0.44)], {}, []),
    ("prompts_are_filled_with_a_label", [known(filled=0.5, same=0.5), known()], {}, []),
    ("prompts_are_filled_with_a_label", [known(filled=0.5, same=0.5)], {"custom_loss": True}, []),
    ("prompts_are_targets", [known()], ANSWERS, ["error: none of the prompt is masked"]),
    ("prompts_are_targets", [known(unlabelled=1)], ANSWERS, []),
    ("prompts_are_targets", [known(labels=0)], ANSWERS, []),
    ("prompts_are_targets", [known(kind="sequence")], ANSWERS, []),
    ("prompts_are_targets", [known()], {"expect": Expect(completion_only=True, purpose="inference")}, []),
    ("prompts_are_targets", [known(ends=4, end_targets=4)], {}, ["info: those of a prompt neither"]),
    ("prompts_are_targets", [known(ends=4, end_targets=3)], {}, []),
    ("prompts_are_targets", [known(ends=3, end_targets=3)], {}, []),
    ("texts_never_end", [known(**ENDLESS)], {}, ["info: 2 texts end before their row does"]),
    ("texts_never_end", [known(**ENDLESS)], ANSWERS, ["warning: 2 texts end before their row does"]),
    ("texts_never_end", [known(**{**ENDLESS, "prompted": 3})], {}, []),
    ("texts_never_end", [known(**{**ENDLESS, "prompted": 3})], ANSWERS, ["warning: 2 texts"]),
    ("texts_never_end", [known(**{**ENDLESS, "finished": 1})], ANSWERS, []),
    ("texts_never_end", [known(**{**ENDLESS, "last_tokens": 1})], ANSWERS, []),
    ("texts_never_end", [known(**ENDLESS, closed=1)], ANSWERS, []),
    ("texts_never_end", [known(**ENDLESS, padding=1)], ANSWERS, []),
    ("texts_never_end", [known(**ENDLESS, kind="sequence")], ANSWERS, []),
    ("texts_never_end", [known(**ENDLESS)], {"expect": Expect(purpose="inference")}, []),
]


@pytest.mark.parametrize(
    ("rule", "labels", "changes", "words"), CASES, ids=[f"{i}-{one[0]}" for i, one in enumerate(CASES)]
)
def test_labels(
    sound: TrainingFacts, rule: str, labels: list[LabelFacts], changes: dict[str, Any], words: list[str]
) -> None:
    given = dict(changes)
    expect = given.pop("expect", None)
    facts = replace(sound, **{"labels": tuple(labels), "custom_loss": False, "shift": None, **given})
    says(rule, facts, *words, expect=expect)


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize(
    ("limit", "norms", "optimizer", "words"),
    [
        (0.0, (1.0, 1.0), "AdamW", ["error: every gradient is clipped to zero"]),
        (None, (1.0, 1.0), "AdamW", []),
        (9.9e-5, (1.0, 1.0), "SGD", ["warning: next to nothing is left"]),
        (1e-4, (1.0, 1.0), "SGD", []),
        (9e-4, (10.0, 10.0), "SGD", ["warning: gradients of norm 10 are clipped to 0.0009"]),
        (1.1e-3, (10.0, 10.0), "SGD", []),
        (9e-5, (1e-5, 1.0), "SGD", []),
        (9e-5, (math.inf, 1.0), "SGD", ["warning: gradients of norm 1 are"]),
        (9e-5, (None, None), "SGD", []),
        (9.9e-8, (1.0, 1.0), "AdamW", ["warning: next to nothing is left"]),
        (1.01e-7, (1.0, 1.0), "AdamW", []),
        (9e-5, (1.0, 1.0), "Lion", []),
    ],
)
def test_clipping(
    sound: TrainingFacts, limit: float | None, norms: Any, optimizer: str, words: list[str]
) -> None:
    facts = changed(sound, norms=norms, optimizer=optimizer, groups={"eps": 1e-8}, max_grad_norm=limit)
    (tensor, *_) = facts.tensors
    facts = replace(facts, tensors=(replace(tensor, numbers=100, held=True, trainable=True),))
    says("gradients_are_clipped_away", facts, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps_taken": 10}, ["warning: the schedule has counted 10 steps, the optimizer none"]),
        ({"steps_taken": 9}, []),
        ({"steps_taken": 10, "drives": False}, []),
    ],
)
def test_a_schedule_that_was_resumed_alone(sound: TrainingFacts, changes: Any, words: list[str]) -> None:
    facts = changed(sound, schedule=replace(schedule(), **changes))
    facts = replace(facts, optimizer=replace(facts.optimizer, steps=()))
    says("schedule_was_resumed_alone", facts, *words)
    says("schedule_was_resumed_alone", replace(facts, schedule=None))


@pytest.mark.parametrize(
    ("plan", "history", "words"),
    [
        ({"warm_up": 100, "planned": 100}, (), ["warning: the warm-up takes 100 steps of a training of 100"]),
        ({"warm_up": 99, "planned": 100}, (), []),
        ({"warm_up": 100, "planned": 100}, (), ["warning: set num_warmup_steps=5, and"]),
        ({"warm_up": 20, "planned": 20}, (), ["warning: set num_warmup_steps=1, and"]),
        ({"warm_up": 19, "planned": 19}, (), ["info: set num_warmup_steps=1, and"]),
        ({"warm_up": 19, "planned": 19}, (4.0,) * 5, ["warning: the warm-up takes 19"]),
        ({"warm_up": 0, "planned": 0}, (), []),
        ({"warm_up": 5, "planned": 0}, (), []),
        ({"warm_up": 5, "planned": None}, (), []),
    ],
)
def test_a_warm_up_beside_its_training(
    sound: TrainingFacts, plan: Any, history: Any, words: list[str]
) -> None:
    facts = changed(sound, schedule=schedule(**plan), history=history)
    says("warm_up_outlasts_training", facts, *words)
    says("warm_up_outlasts_training", replace(facts, schedule=None))


@pytest.mark.parametrize(
    ("group", "expect", "words"),
    [
        ({"weight_decay": 5.0, "lr": 1e-6}, {}, ["warning: set weight_decay=0.01"]),
        ({"weight_decay": 4.99, "lr": 1e-6}, {}, []),
        ({"weight_decay": 0.5, "lr": 0.1}, {}, ["error: takes 5 % off the adapter at every step"]),
        ({"weight_decay": 0.49, "lr": 0.1}, {}, []),
        ({"weight_decay": 0.5, "lr": 0.01, "initial_lr": 0.1}, {}, ["error: set weight_decay=0.01"]),
        ({"weight_decay": 0.01, "lr": 5.0}, {}, ["error: set lr=2e-4, the learning rate that"]),
        ({"weight_decay": 0.02, "lr": 5.0}, {}, ["error: set weight_decay=0.01 and lr=2e-4"]),
        ({"weight_decay": 0.02, "lr": 4.9}, {}, ["error: set weight_decay=0.01"]),
        ({"weight_decay": 0.005, "lr": 20.0}, {}, ["error: set lr=2e-4"]),
        ({"weight_decay": 5.0, "lr": 1e-6, "parts": ("saved",)}, {}, []),
        ({"weight_decay": 5.0, "lr": 1e-6}, {"purpose": "inference"}, []),
    ],
)
def test_a_decay(sound: TrainingFacts, group: Any, expect: Any, words: list[str]) -> None:
    facts = changed(sound, groups=group).optimizer
    says("weight_decay_erases_the_adapter", facts, *words, expect=Expect(**expect))
    fixes = [one.fix for one in told("weight_decay_erases_the_adapter", facts, Expect(**expect))]
    assert all(("and lr=" in fix) is ("and lr=" in words[0]) for fix in fixes)


def test_clipping_under_the_default_eps(sound: TrainingFacts) -> None:
    for limit, is_told in ((9e-9, True), (2e-8, False)):
        facts = changed(sound, groups={"eps": None}, max_grad_norm=limit)
        (tensor, *_) = facts.tensors
        facts = replace(facts, tensors=(replace(tensor, numbers=1, held=True, trainable=True),))
        says("gradients_are_clipped_away", facts, *(["warning: next to nothing is left"] if is_told else []))


def test_a_loss_of_zero(sound: TrainingFacts) -> None:
    zero = changed(sound, losses=(0.0, 0.0), norms=(0.0, 0.0))
    says("loss_is_exactly_zero", replace(zero, labels=(known(),)), "error: exactly 0 at all 2 steps")
    says("loss_is_exactly_zero", replace(zero, labels=(known(labels=0),)))
    says("loss_is_exactly_zero", replace(changed(sound, losses=(0.0, 1.0)), labels=(known(),)))


def test_classes_of_the_first_batch_that_knows_them(sound: TrainingFacts) -> None:
    labels = (known(kind="classes", limit=None), known(kind="classes", limit=4))
    facts = changed(sound, losses=(1.0, 1.0), labels=labels, history=(3.0, 3.0), batches=3)
    says("loss_is_summed", facts, "error: the sum over 3 accumulation steps")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, 1), ["warning: load the base with 2 labels"]),
        ((0,), ["warning: load the base with 2 labels"]),
        ((0, 1, 2), ["info: load the base with 3 labels"]),
        ((1, 5), ["info: load the base with 6 labels"]),
        ((-1, 1), []),
        ((), []),
    ],
)
def test_classes_that_are_taken_for_numbers(
    sound: TrainingFacts, values: tuple[int, ...], words: list[str]
) -> None:
    targets = (WholeTargets(0, 4, values),) if values else ()
    says("classes_are_taken_for_numbers", replace(sound, whole_targets=targets), *words)


@pytest.mark.parametrize(
    ("after", "by", "told_alone"), [(0.5, 0.5, True), (0.5, 0.25, True), (0.5, 0.625, False)]
)
def test_a_loss_that_something_else_lowered(after: float, by: float, told_alone: bool) -> None:
    facts = LossDrop(1.0, after, (1.0, after), 1e-3, by, adapter_learned=False)
    (found,) = told("loss_does_not_fall", facts)
    assert ("something else lowered it" in found.observed) == told_alone
