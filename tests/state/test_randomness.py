"""Random states are put back, also those of a CUDA that nothing had started."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pytest_lora import rank_sweep
from pytest_lora.inspection.state.process import RandomStates
from tests.simulated_cuda import MACHINES, PlayedCuda, play
from tests.sweep import toys


def drawn(played: PlayedCuda) -> list[float]:
    """The next number of each CUDA generator, which starts CUDA as a user would."""
    torch.cuda.init()
    return [float(torch.rand((), generator=generator)) for generator in played.generators]


@pytest.mark.parametrize("name", ["H200", "two L4"])
@pytest.mark.parametrize("inside", ["seeds", "seeds and starts", "starts and draws", "nothing"])
@pytest.mark.parametrize("started", [False, True])
def test_cuda_draws_after_it_as_if_nothing_had_been_inside(
    monkeypatch: pytest.MonkeyPatch, name: str, inside: str, started: bool
) -> None:
    played = play(monkeypatch, MACHINES[name], started=started)
    torch.manual_seed(11)
    expected = [float(torch.rand((), generator=torch.Generator().manual_seed(11))) for _ in played.generators]
    before = RandomStates()
    if "seeds" in inside:
        torch.manual_seed(99)
        torch.cuda.manual_seed(98)
    if "starts" in inside:
        drawn(played)
    before.restore()
    assert played.started == (started or "starts" in inside)
    assert drawn(played) == expected


@pytest.mark.parametrize("name", ["xpu", "mps"])
def test_other_accelerators_in_use_draw_as_if_nothing_had_been_inside(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    read, write = {
        "xpu": ("get_rng_state_all", "set_rng_state_all"),
        "mps": ("get_rng_state", "set_rng_state"),
    }[name]
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: name == "xpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: name == "mps")
    monkeypatch.setattr(getattr(torch, name), read, generator.get_state)
    monkeypatch.setattr(getattr(torch, name), write, generator.set_state)
    expected = float(torch.rand((), generator=torch.Generator().manual_seed(5)))
    before = RandomStates()
    torch.rand(3, generator=generator)
    before.restore()
    assert float(torch.rand((), generator=generator)) == expected


def test_without_a_seed_cuda_does_not_go_on_from_the_seed_of_what_was_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    played = play(monkeypatch, MACHINES["L4"])
    before = RandomStates()
    torch.manual_seed(99)
    torch.cuda.init()
    before.restore()
    assert played.generators[0].initial_seed() != 99


def test_a_sweep_that_is_the_first_to_use_cuda_leaves_its_random_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    played = play(monkeypatch, MACHINES["H200"])

    def make_model() -> torch.nn.Module:
        torch.cuda.init()
        return toys.make_model()

    torch.manual_seed(11)
    rank_sweep(make_model, toys.train, toys.evaluate, config=toys.CONFIG, ranks=[2, 4], progress=False)
    assert played.started
    assert drawn(played) == [float(torch.rand((), generator=torch.Generator().manual_seed(11)))]


def test_python_numpy_and_the_cpu_go_on_where_they_were() -> None:
    before = RandomStates()
    first = random.random(), np.random.rand(), float(torch.rand(()))
    before.restore()
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == first
    before.restore()
