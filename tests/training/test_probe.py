"""A few real steps on a tiny model: what is counted, what is passed on, and what is told of an error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pytest_lora.bases.examples.models import VOCABULARY, language_batch
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.optimizer import RATE
from pytest_lora.inspection.training.probe import prepared, training_facts
from tests.rules.training.setups import adapted, trainable

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return adapted(lora_dropout=0.25)


def batch(rows: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return language_batch(rows, length)


def facts(model: Any, batches: Any = None, **plan: Any) -> TrainingFacts:
    return training_facts(
        model, batch() if batches is None else batches, Plan(**{"steps": 2, "rate": 0.01, **plan})
    )


def moved(found: TrainingFacts, step: int = 0) -> float:
    """L2 norm of what a step changed."""
    return math.sqrt(sum(t.moves[step] ** 2 * t.numbers for t in found.tensors))


def test_batches_are_counted(model: Any) -> None:
    one = batch()
    assert facts(model, one).batches == 1
    assert facts(model, [one] * 3, steps=1).batches == 3
    assert facts(model, iter([one] * 3)).batches == 2
    more = facts(model, [one, {**one, "extra": one["labels"]}], steps=1)
    assert (set(more.inputs), more.later_inputs) == (set(one), ("extra",))
    unused = facts(model, [one, one, one], steps=0)
    assert (unused.steps, unused.untouched, unused.updates, unused.alone) == ((), (), (), None)


def test_the_optimizer_that_is_made(model: Any) -> None:
    found = facts(model)
    assert [step.rates for step in found.steps] == [(0.01,), (0.01,)]
    assert (found.optimizer_given, found.optimizer_is_fresh, found.custom_loss, found.scaler) == (False,) * 4
    assert (found.lora_dropout, found.updates, found.shift is not None) == (0.25, (), True)
    assert (found.switched_off, found.without_graph, found.cut, found.untouched) == (False, (), (), ())
    assert [step.batch for step in found.steps] == [0, 0]
    chosen = facts(model, steps=1, rate=None)
    assert 0 < chosen.steps[0].rates[0] <= RATE
    frozen = adapted().requires_grad_(False)
    nothing = facts(frozen, steps=1)
    assert (nothing.optimizer.frozen, nothing.optimizer.foreign, nothing.optimizer.held) == (0, 0, ())
    assert [step.has_graph for step in nothing.steps] == [False]
    assert len(nothing.without_graph) == 0


def test_steps_of_a_given_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    found = facts(model, optimizer=optimizer, scheduler=schedule)
    assert [step.rates for step in found.steps] == [(1.0,), (0.1,)]
    assert (found.optimizer_given, found.optimizer_is_fresh) == (True, True)
    norm = found.steps[0].gradient_norm
    assert norm is not None
    assert moved(found) == pytest.approx(norm, rel=1e-3)
    clipped = facts(model, optimizer=optimizer, max_grad_norm=norm / 100)
    assert moved(clipped) == pytest.approx(norm / 100, rel=1e-2)
    assert clipped.max_grad_norm == norm / 100
    optimizer.state[trainable(model)[0]] = {"momentum_buffer": None}
    assert not facts(model, optimizer=optimizer, steps=1).optimizer_is_fresh


@pytest.mark.parametrize("enabled", [True, False])
def test_steps_with_a_scaler(model: Any, enabled: bool) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=enabled)
    found = facts(model, optimizer=optimizer, scaler=scaler, steps=1)
    assert found.scaler is enabled
    assert moved(found) == pytest.approx(found.steps[0].gradient_norm, rel=1e-3)
    plain = facts(model, optimizer=optimizer, steps=1)
    assert found.steps[0].gradient_norm == pytest.approx(plain.steps[0].gradient_norm, rel=1e-3)
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert moved(facts(model, optimizer=foreign, scaler=scaler, steps=1)) == 0.0


def test_a_schedule_that_ends_is_stepped_no_more(model: Any) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=2)
    assert len(facts(model, optimizer=optimizer, scheduler=schedule, steps=4).steps) == 4


def test_ranks_are_measured_where_they_are_asked_for(model: Any) -> None:
    assert {update.rank is not None for update in facts(model, ranks=True).updates} == {True}
    assert facts(model, ranks=True, steps=0).updates == ()
    rewritten = adapted(init_lora_weights="pissa")
    assert {update.rank for update in facts(rewritten, steps=1).updates} == {None}


def test_tokens_that_do_not_exist_are_not_run(model: Any) -> None:
    for name in ("input_ids", "labels"):
        bad = batch()
        bad[name] = bad[name].clone()
        bad[name][0, 3] = VOCABULARY
        assert facts(model, bad).steps == ()


def test_a_text_alone_is_asked_of_the_models_own_loss(model: Any) -> None:
    padded = batch()
    padded["attention_mask"][0, -2:] = 0
    own = facts(model, padded, steps=1)
    assert own.alone is not None
    given = facts(model, padded, steps=1, loss_fn=lambda model, one: model(**one)["loss"])
    assert (given.alone, given.custom_loss, given.shift is not None) == (None, True, True)


def test_adapters_that_are_switched_off_meanwhile() -> None:
    model = adapted()

    def switched(model: Any, one: Any) -> Any:
        loss = model(**one)["loss"]
        with model.disable_adapter():
            return loss + 0 * model(**one)["loss"]

    assert facts(model, steps=1, loss_fn=switched).switched_off
    model.base_model.disable_adapter_layers()
    assert not facts(model, steps=1).switched_off


def failing(model: Any, one: Any) -> Any:
    raise RuntimeError("index out of range in self")


def test_what_a_step_raises_is_told_or_passed_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(message: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(message)

        return forward

    with monkeypatch.context() as patched:
        patched.setattr(model.base_model.model, "forward", raising("index out of range in self"))
        told = facts(model, tell_failures=True)
        assert told.failure is not None
        assert (told.failure.kind, told.failure.step, told.failure.batch, told.steps) == ("index", 1, 0, ())
        with pytest.raises(RuntimeError, match="index out of range") as passed:
            facts(model)
        assert "batches: raised in the forward pass of step 1" in passed.value.__notes__
    with monkeypatch.context() as patched:
        patched.setattr(model.base_model.model, "forward", raising("of an unknown kind"))
        with pytest.raises(RuntimeError, match="unknown kind"):
            facts(model, tell_failures=True)
    with pytest.raises(RuntimeError, match="index out of range"):
        facts(model, tell_failures=True, loss_fn=failing)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "step", raising("something else"))
        with pytest.raises(RuntimeError, match="something else") as stepped:
            facts(model, optimizer=optimizer)
        assert "optimizer: raised in the optimizer step of step 1" in stepped.value.__notes__


def test_a_model_is_moved_only_where_that_is_asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: asked.append(device))
    with prepared(model, batch(), Plan(1, 0.01)):
        assert asked == []
    with prepared(model, batch(), Plan(1, 0.01), torch.device("cpu")):
        assert asked == [torch.device("cpu")]


def test_adapters_without_values_are_refused_and_frozen_weights_without_are_not(model: Any) -> None:
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    model.further = empty
    try:
        with pytest.raises(ValueError, match="its adapter is on the meta device"):
            facts(model)
        empty.requires_grad_(False)
        assert facts(model, steps=0).steps == ()
    finally:
        del model.further


def test_values_that_a_keeper_has() -> None:
    weight, other = nn.Linear(2, 1), nn.Linear(2, 1)
    before = weight.weight.detach().clone()
    with Keeper(weight) as keeper:
        keeper.keep(other.weight)
        with torch.no_grad():
            weight.weight.zero_()
        first, second = keeper.before(weight.weight), keeper.before(other.weight)
        assert first is not None
        assert second is not None
        assert torch.equal(first, before)
        assert torch.equal(second, other.weight)
        assert keeper.before(torch.ones(1)) is None
