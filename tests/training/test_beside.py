"""What is looked at beside the steps of a training: at which of them, and what it takes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_lora.bases.examples.models import language_batch
from pytest_lora.facts.steps import SpreadFacts
from pytest_lora.inspection.training import beside
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.beside import Beside, Padding, listening
from pytest_lora.inspection.training.circumstances import Ran
from pytest_lora.inspection.training.probe import training_facts
from tests.rules.training.setups import adapted
from tests.test_labels import words


def own_loss(*given: Any) -> torch.Tensor:
    return torch.zeros(())


def looking(plan: Plan, *, cut: bool = False, checkpoints: bool = False) -> Any:
    """Beside the steps of a model without a graph of its own."""
    root: Any = nn.Sequential(nn.Linear(1, 1))
    root[0].gradient_checkpointing = checkpoints
    passed: Any = SimpleNamespace(at_most=lambda ran: cut and ran is Ran.CUT)
    return Beside(root, root, plan, passed)


def test_the_shift_is_that_of_the_first_loss() -> None:
    facts = training_facts(adapted(), language_batch(), Plan(steps=2, rate=1e-1))
    assert facts.shift is not None
    assert facts.shift.loss == facts.steps[0].loss != facts.steps[1].loss


def test_sizes_are_listened_to_at_the_first_step() -> None:
    known = looking(Plan(steps=3, rate=None))
    for number in (1, 2, 3):
        with warnings.catch_warnings(record=True), known.hearing(number):
            nn.functional.mse_loss(torch.zeros(3 + number, 1), torch.zeros(3 + number))
    assert known.spread == [SpreadFacts(target=(4,), given=(4, 1))]


@pytest.mark.parametrize(
    ("given", "target", "spread"),
    [
        ((4, 1), (4,), True),
        ((4, 3), (4, 1), False),
        ((4, 1), (1,), False),
        ((1, 4), (4,), False),
        ((1, 4), (4, 1), True),
    ],
)
def test_what_is_spread_is_more_than_either(
    given: tuple[int, ...], target: tuple[int, ...], spread: bool
) -> None:
    heard: list[SpreadFacts] = []
    with warnings.catch_warnings(record=True), listening(heard):
        nn.functional.mse_loss(torch.zeros(given), torch.zeros(target))
    assert heard == [SpreadFacts(target=target, given=given)] * spread


def test_a_text_alone_is_asked_for_at_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "BatchLaw", lambda *_: SimpleNamespace(asks=True))
    known = looking(Plan(steps=2, rate=None))
    assert [known._law_of(number, {}) is not None for number in (1, 2)] == [False, True]
    assert looking(Plan(steps=1, rate=None, loss_fn=own_loss))._law_of(1, {}) is None
    monkeypatch.setattr(beside, "BatchLaw", lambda *_: SimpleNamespace(asks=False))
    assert known._law_of(2, {}) is None


def test_padding_is_asked_for_at_the_last_step_of_an_own_loss() -> None:
    plan = Plan(steps=2, rate=None, loss_fn=own_loss)
    assert [looking(plan)._asks_for_padding(number) for number in (1, 2)] == [False, True]
    assert not looking(Plan(steps=1, rate=None, loss_fn=own_loss))._asks_for_padding(1)
    assert not looking(Plan(steps=2, rate=None))._asks_for_padding(2)
    assert not looking(plan, cut=True)._asks_for_padding(2)
    assert not looking(plan, checkpoints=True)._asks_for_padding(2)


class Embedded(nn.Module):
    """Two rows of three tokens in two numbers each."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(10, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.embeddings(input_ids)


def share(weight: list[float], filler: int = 0, **special: Any) -> float | None:
    """The share of padding in a loss that weighs the positions so."""
    model = Embedded()
    padding = Padding(model, words(**{"pad": 0, "stops": (2,), **special}))
    ids = torch.tensor([[5, 6, 7], [5, 6, filler]])
    states = model(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    (states * torch.tensor(weight)[:, None]).sum().backward()
    found = padding.seen(3)
    assert not model.embeddings._forward_hooks
    if found is not None:
        assert (found.batch, found.rows) == (3, 1)
    return None if found is None else found.share


def test_the_share_of_padding_is_that_of_the_gradient() -> None:
    assert share([0, 0, 1]) == pytest.approx(0.5**0.5), "one row of two"
    assert share([1, 1, 1]) == pytest.approx((1 / 6) ** 0.5)
    assert share([1, 1, 0]) == 0
    assert share([0, 0, 0]) is None, "no gradient"


def test_padding_is_the_pad_token_or_one_that_ends_texts() -> None:
    assert share([1, 1, 1], filler=2) is not None
    assert share([1, 1, 1], filler=9) is None
    assert share([1, 1, 1], filler=9, pad=None) is not None, "any one token, where none is named"
