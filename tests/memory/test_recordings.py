"""What is run of a step and what is said of it, for steps made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.memory import trainer_steps
from pytest_lora.inspection.memory.dry_run import Trace
from pytest_lora.inspection.memory.sizes import Family, Point
from pytest_lora.inspection.memory.step import Recorded
from pytest_lora.inspection.memory.surfaces import Recording, Recordings

TRACE = Trace(
    events=[0, 1, ~0, ~1],
    units=[0, 0, 0, 0],
    phases=["forward"] * 4,
    sizes=[8, 9],
    categories=["activations", "adapters"],
    operations=["mm", "mm"],
    streams=[0, 0],
    flops=[(0, "forward", 10)],
)


def one(**changes: Any) -> Recording:
    return Recording(Recorded((replace(TRACE, **changes),), None))


def test_values_are_sizes_and_counts_of_every_trace() -> None:
    later, evaluation = replace(TRACE, sizes=[1, 2]), replace(TRACE, sizes=[3, 4], flops=[])
    assert Recording(Recorded((TRACE, later), evaluation)).values() == [8, 9, 10, 1, 2, 10, 3, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"events": [0, 1, ~1, ~0]},
        {"units": [0, 0, 1, 1]},
        {"phases": ["backward"] * 4},
        {"categories": ["activations", "gradients"]},
        {"operations": ["mm", "add"]},
        {"streams": [0, 3]},
        {"flops": [(0, "backward", 10)]},
        {"flops": []},
    ],
)
def test_recordings_are_alike_where_values_alone_differ(changes: dict[str, Any]) -> None:
    assert one(sizes=[80, 90], flops=[(0, "forward", 7)]).is_like(one())
    assert one(streams=[0, 3]).is_like(one(streams=[0, 7])), "the number of a stream says nothing"
    assert not one(**changes).is_like(one())


def test_what_was_said_is_the_same_in_form_and_values() -> None:
    assert one().is_said_by(one().recorded)
    assert not one().is_said_by(one(sizes=[8, 10]).recorded)
    assert not one().is_said_by(one(operations=["mm", "add"]).recorded)


class Runs:
    """Runs of a step: one product a value, but where ``beside`` adds to a size, and with operations of its own."""

    def __init__(
        self,
        beside: Callable[[Point], int] = lambda point: 0,
        named: Callable[[Point], str] = lambda point: "mm",
    ) -> None:
        self.points: list[Point] = []
        self._beside, self._named = beside, named

    def value(self, point: Point) -> Recorded:
        batch, length, rank = point
        trace = replace(
            TRACE,
            sizes=[4 * batch * length + self._beside(point), 8 * rank],
            flops=[(0, "forward", 2 * batch * length * rank)],
            operations=[self._named(point), "mm"],
        )
        return Recorded((trace,), replace(trace, sizes=[rank, batch]))

    def __call__(self, point: Point) -> Recorded:
        self.points.append(point)
        return self.value(point)

    def recordings(self) -> Recordings:
        return Recordings(lambda point: Family(point, ()), self)


def test_a_point_is_run_once() -> None:
    runs = Runs()
    known = runs.recordings()
    for _ in range(3):
        assert known.at((2, 30, 8)) == runs.value((2, 30, 8))
    assert runs.points == [(2, 30, 8)]
    assert known((2, 30, 9)) is None


def test_a_second_point_tells_of_all_others() -> None:
    runs = Runs()
    known = runs.recordings()
    known.at((2, 30, 8))
    known.learn((2, 40, 16))
    ran = len(runs.points)
    assert ran == 2
    for point in ((2, 40, 16), (5, 77, 3), (4, 1000, 64)):
        assert known.at(point) == runs.value(point)
    known.learn((3, 50, 4))
    assert len(runs.points) == ran


def test_what_holds_for_many_sequences_is_tried_for_one() -> None:
    runs = Runs()
    known = runs.recordings()
    known.at((2, 30, 8))
    known.learn((2, 40, 16))
    known.learn((1, 40, 16))
    assert runs.points[2:] == [(1, 40, 16)], "a run of the point shows that the products hold"
    assert known.at((1, 99, 4)) == runs.value((1, 99, 4))
    assert len(runs.points) == 3


def test_one_sequence_that_runs_otherwise_has_products_of_its_own() -> None:
    runs = Runs(named=lambda point: "bmm" if point[0] == 1 else "mm")
    known = runs.recordings()
    known.at((2, 30, 8))
    known.learn((2, 40, 16))
    known.learn((1, 40, 16))
    assert known((1, 50, 16)) is None
    known.learn((1, 50, 16))
    assert known.at((1, 60, 4)) == runs.value((1, 60, 4))
    assert known.at((2, 60, 4)) == runs.value((2, 60, 4))
    assert (1, 60, 4) not in runs.points


def test_families_of_one_and_of_several_are_learned_ahead() -> None:
    runs = Runs(named=lambda point: "bmm" if point[0] == 1 else "mm")
    known = runs.recordings()
    known.at((1, 30, 8))
    known.learn_ahead((1, 30, 8))
    ran = list(runs.points)
    assert {batch > 1 for batch, _, _ in ran} == {False, True}
    for point in ((1, 77, 16), (6, 77, 16)):
        assert known.at(point) == runs.value(point)
    assert runs.points == ran
    known.learn_ahead((6, 77, 16))
    assert runs.points == ran


def test_what_is_no_product_is_run() -> None:
    runs = Runs(beside=lambda point: point[1] % 7)
    known = runs.recordings()
    for point in ((2, 30, 8), (2, 40, 16), (2, 50, 32)):
        known.at(point)
        known.learn(point)
        assert known.at(point) == runs.value(point)
    assert known((2, 60, 8)) is None


def test_as_little_is_run_as_tells() -> None:
    alike = Runs()
    known = alike.recordings()
    known.at((1, 30, 8))
    known.learn_ahead((1, 30, 8))
    assert alike.points == [(1, 30, 8), (37, 211, 23)], "one and several in one product"
    apart = Runs(named=lambda point: "bmm" if point[0] == 1 else "mm")
    known = apart.recordings()
    known.at((1, 30, 8))
    known.learn_ahead((1, 30, 8))
    assert apart.points == [(1, 30, 8), (37, 211, 23), (1, 211, 23), (41, 223, 8)]


def test_what_is_refused_is_not_tried_again() -> None:
    runs = Runs(beside=lambda point: point[1] % 7)
    known = runs.recordings()
    known.at((2, 30, 8))
    for point in ((2, 40, 16), (2, 50, 32)):
        known.learn(point)
    assert runs.points == [(2, 30, 8), (37, 211, 23), (41, 223, 29)]


def test_what_runs_on_one_side_of_a_threshold_says_nothing_of_the_other() -> None:
    runs = Runs()
    known = Recordings(lambda point: Family(point, (35,)), runs)
    known.at((2, 30, 8))
    known.learn((2, 40, 16))
    assert runs.points == [(2, 30, 8)]
    assert known((2, 40, 16)) is None


@pytest.mark.parametrize("logits", [torch.eye(3)[1:], (torch.eye(3)[1:], torch.zeros(1)), None])
@pytest.mark.parametrize("keeps", ["loss", "logits", "predictions"])
def test_predictions_are_the_largest_logits(monkeypatch: pytest.MonkeyPatch, logits: Any, keeps: str) -> None:
    def step(model: Any, batch: Any, prediction_loss_only: bool) -> Any:
        assert prediction_loss_only is (keeps == "loss")
        return 1.0, logits, "labels"

    trainer = SimpleNamespace(prediction_step=step)
    monkeypatch.setattr(trainer_steps, "_of_transformers", lambda model, setting: trainer)
    layer = torch.nn.Linear(1, 1)
    loss, found, labels = trainer_steps.prediction_step(layer, layer, StepSetting(1, 1), {}, keeps)
    assert (loss, labels) == (1.0, "labels")
    if keeps == "predictions" and logits is not None:
        assert found.tolist() == [1, 2]
    else:
        assert found is logits
