"""Runs of like layers in a list, and which layers of one are taken out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pytest_lora.inspection.memory.layer_stacks import _longest_run, _runs, _signature, cut_stacks


@pytest.mark.parametrize(
    ("kinds", "together", "run"),
    [
        ([], 1, (0, 1, 1)),
        ([1] * 5, 1, (0, 1, 1)),
        ([1] * 6, 1, (0, 1, 6)),
        ([0, *[1] * 7, 2], 1, (1, 1, 7)),
        ([1] * 7 + [2] * 7, 1, (0, 1, 7)),
        ([1] * 7 + [2] * 8, 1, (7, 1, 8)),
        ([1, 2] * 6, 1, (0, 2, 6)),
        ([0, *[1, 2] * 6, 1], 1, (1, 2, 6)),
        ([*range(8)] * 6, 1, (0, 8, 6)),
        ([*range(9)] * 6, 1, (0, 1, 1)),
        ([1] * 12, 2, (0, 2, 6)),
        ([1] * 11, 2, (0, 1, 1)),
        ([1] * 13, 1, (0, 1, 13)),
        ([1, 2, 3] * 7, 2, (0, 1, 1)),
        ([1, 2, 3] * 13, 2, (0, 6, 6)),
    ],
)
def test_the_longest_run(kinds: list[int], together: int, run: tuple[int, int, int]) -> None:
    assert _longest_run(kinds, together) == run


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        ([1] * 5, []),
        ([1] * 6, [(0, 1, 6)]),
        ([1] * 7 + [2] * 8, [(0, 1, 7), (7, 1, 8)]),
        ([3, *[1, 2] * 7, *[4] * 6, 5, *[6] * 6], [(1, 2, 7), (15, 1, 6), (22, 1, 6)]),
    ],
)
def test_all_runs_in_their_order(kinds: list[int], runs: list[tuple[int, int, int]]) -> None:
    assert list(_runs(kinds, 1)) == runs


class Holder(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList(layers)


def left(model: Holder) -> list[int]:
    layers: Any = model.inner.layers
    return [int(name) for name in layers._modules]


def test_the_inner_layers_are_taken_out() -> None:
    model = Holder([nn.Linear(2, 2) for _ in range(9)])
    layers: Any = list(model.inner.layers)
    (stack,) = cut_stacks(model)
    assert left(model) == [0, 1, 2, 7, 8]
    assert (stack.copies, stack.number) == (6, 0)
    assert stack.units == tuple((layers[i],) for i in (0, 1, 2, 7, 8))


def test_pairs_of_layers_are_taken_out_together() -> None:
    model = Holder([nn.Linear(2, 2 + i % 2) for i in range(14)])
    layers: Any = list(model.inner.layers)
    (stack,) = cut_stacks(model)
    assert left(model) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13]
    assert stack.copies == 4
    assert stack.units[3] == (layers[10], layers[11])


def test_stacks_are_numbered_and_lists_in_layers_stay() -> None:
    def experts() -> nn.Module:
        layer = nn.Module()
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
        return layer

    model = Holder([*(nn.Linear(3, 3) for _ in range(6)), *(experts() for _ in range(7))])
    stacks = cut_stacks(model)
    assert [(stack.copies, stack.number) for stack in stacks] == [(3, 0), (4, 1)]
    assert left(model) == [0, 1, 2, 4, 5, 6, 7, 8, 11, 12]
    layer: Any = stacks[1].units[0][0]
    assert len(layer.experts) == 9
    assert cut_stacks(Holder([nn.Linear(2, 2) for _ in range(5)])) == []


def named(**attributes: Any) -> nn.Module:
    layer = nn.Linear(2, 2)
    vars(layer).update(attributes)
    return layer


def with_buffer(tensor: torch.Tensor | None) -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_buffer("kept", tensor)
    return layer


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (named(), named(), True),
        (named(layer_idx=1), named(layer_idx=2), True),
        (named(window=1), named(window=2), False),
        (named(window=None), named(window=2), False),
        (named(callback=print), named(callback=repr), True),
        (nn.Linear(2, 2), nn.Linear(2, 3), False),
        (nn.Linear(2, 2), nn.Linear(2, 2).half(), False),
        (nn.Linear(2, 2, bias=False), nn.Linear(2, 2), False),
        (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), False),
        (with_buffer(torch.zeros(2)), with_buffer(torch.ones(2)), True),
        (with_buffer(torch.zeros(2)), with_buffer(torch.zeros(3)), False),
        (with_buffer(torch.zeros(2)), with_buffer(torch.zeros(2).half()), False),
        (with_buffer(None), with_buffer(torch.zeros(2)), False),
    ],
)
def test_what_tells_a_layer_from_another(one: nn.Module, other: nn.Module, alike: bool) -> None:
    assert (_signature(one) == _signature(other)) is alike


def test_marks_are_asked_by_the_names_in_the_model() -> None:
    asked: list[str] = []
    model = Holder([nn.Sequential(nn.Linear(2, 2)) for _ in range(7)])
    cut_stacks(model, mark=lambda name: asked.append(name) or name == "inner.layers.6.0")
    assert asked[:2] == ["inner.layers.0", "inner.layers.0.0"]
    assert left(model) == [0, 1, 2, 4, 5, 6]
