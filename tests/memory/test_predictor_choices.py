"""How many traces a prediction takes, what it says without one, and what it says that it leaves out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from pytest_lora.facts.memory import Quantization, StepSetting
from pytest_lora.facts.memory_choices import Evaluation, Parallel
from pytest_lora.facts.operations import StepFlops
from pytest_lora.inspection.memory import predictor
from pytest_lora.inspection.memory.cuda_allocator import plainly_replayed
from pytest_lora.inspection.memory.estimate import StepShape
from pytest_lora.inspection.memory.predictor import Predictor
from pytest_lora.inspection.memory.sizes import Family, Point
from pytest_lora.inspection.memory.step import Step, renumbered
from pytest_lora.inspection.memory.surfaces import Surfaces, Traced
from pytest_lora.inspection.memory.unmodelled import of_setting

# ---------------------------------------------------------------------------------- surfaces


class Model:
    """Steps whose sizes are given, and how often one was traced."""

    def __init__(self, *sizes: Any, thresholds: tuple[int, ...] = (), shares: int = 1, **more: Any) -> None:
        self.sizes, self.more = sizes, more
        self.traced: dict[Point, Traced] = {}
        self.kept = self.passing = 0
        self.surfaces = Surfaces(
            lambda point: Family(point, thresholds, shares), self.traced, self.trace, self.step_of_grid
        )

    def step(self, point: Point) -> Step:
        batch, length, rank = point
        step = Step()
        made = [step.make(size(*point), "activations", "op", "forward", -1) for size in self.sizes]
        for index in made:
            step.free(index, "backward", -1)
        step.first, step.loaded, step.trained = len(made), 1, len(step.events)
        step.paged = 3 * rank
        step.counted = [("forward", 2, 5 * batch * length * rank), ("backward", 1, 7 * rank)]
        step.flops = StepFlops(10 * batch * length * rank, 7 * rank)
        if self.more.get("odd") == point:
            step.free(made[0], "optimizer", -1)
        return step

    def trace(self, point: Point) -> Traced:
        if point not in self.traced:
            self.kept += 1
            self.traced[point] = Traced("shape", self.step(point))
        return self.traced[point]

    def step_of_grid(self, point: Point) -> Step:
        self.passing += 1
        return self.step(point)

    def asked(self, *points: Point) -> list[bool]:
        """Whether each point was answered without a trace of its own."""
        found = []
        for point in points:
            if point in self.traced:
                continue
            self.surfaces.learn(point)
            answer = self.surfaces(point) if point not in self.traced else None
            if answer is None:
                self.trace(point)
            else:
                step = self.step(point)
                assert (answer.sizes.tolist(), answer.paged) == (step.sizes, step.paged)
                assert answer.flops == step.flops
            found.append(answer is not None)
        return found


def products(batch: int, length: int, rank: int) -> int:
    return 512 * batch * length * rank


def sums(batch: int, length: int, rank: int) -> int:
    return 512 * batch * length + 64 * length * rank


def cubes(batch: int, length: int, rank: int) -> int:
    return batch**3 * 512 + length * rank


def test_two_traces_tell_of_all_points_where_sizes_are_products() -> None:
    model = Model(products, lambda b, n, r: 4096)
    assert model.asked((2, 30, 6)) == [False]
    assert model.asked((3, 40, 8), (5, 50, 9), (7, 500, 64)) == [True] * 3
    assert (model.kept, model.passing) == (2, 0)
    # Another family takes one trace more, which shows that the same products hold.
    assert model.asked((1, 30, 6), (1, 99, 12), (5, 50, 1), (6, 77, 1)) == [False, True, False, True]
    assert (model.kept, model.passing) == (4, 0)


def test_families_of_one_sequence_and_of_several_are_learned_ahead_from_two_points_each() -> None:
    model = Model(products, lambda b, n, r: 4096)
    model.trace((2, 30, 6))
    model.surfaces.learn_ahead((2, 30, 6))
    kept = model.kept
    assert sorted({point[0] == 1 for point in model.traced}) == [False, True]
    assert model.asked((3, 40, 8), (1, 50, 9)) == [True, True]
    assert model.kept == kept == 4


def test_a_constant_beside_takes_a_third_trace() -> None:
    model = Model(products, lambda b, n, r: 4096 + 8 * r)
    assert model.asked((2, 30, 6), (3, 40, 8), (5, 50, 9)) == [False, True, True]
    assert (model.kept, model.passing) == (3, 0)


def test_sums_are_traced_six_times_and_then_fitted_to_a_grid_once() -> None:
    model = Model(products, sums)
    points = [(2, 30 + i, 6 + i) for i in range(10)]
    assert model.asked(*points) == [*[False] * 6, *[True] * 4]
    # Six points and the two further ones with which products were looked for; twelve of the grid and one beside it.
    assert (model.kept, model.passing) == (6 + 2, 13)


def test_what_is_no_polynomial_is_traced_and_the_grid_is_tried_once() -> None:
    model = Model(products, cubes)
    points = [(2 + i, 30 + i, 6 + i) for i in range(10)]
    assert model.asked(*points) == [False] * 10
    assert model.passing == 13


@pytest.mark.parametrize(("shares", "thresholds"), [(4, ()), (0, ()), (1, (28, 33)), (1, (28, 32))])
def test_points_that_no_grid_reaches_are_traced(shares: int, thresholds: tuple[int, ...]) -> None:
    model = Model(products, cubes, sums, shares=shares, thresholds=thresholds)
    points = [(2 + i, 30, 6) for i in range(9)]
    assert not any(model.asked(*points))
    assert model.passing == (13 if thresholds == (28, 33) else 0)


def test_steps_that_do_something_else_have_no_products() -> None:
    model = Model(products, odd=(37, 211, 23))
    assert model.asked((2, 30, 6), (3, 40, 8)) == [False, False]
    assert model.kept == 3


def test_streams_are_known_by_their_first_use() -> None:
    assert renumbered([0, 7, 3, 7, 0]) == [0, 1, 2, 1, 0] == renumbered([0, 3, 9, 3, 0])
    assert renumbered([5, 0]) == [1, 0]


# ---------------------------------------------------------------------------------- figures


def test_figures_of_a_step() -> None:
    step = Step()
    weight = step.make(1000, "base weights", "load", "load", -1)
    step.loaded = len(step.events)
    for first in (True, False):
        made = step.make(5000 if first else 6000, "activations", "mm", "forward", -1)
        gradient = step.make(600, "gradients", "mm_backward", "backward", -1)
        step.free(made, "backward", -1)
        step.make(100, "optimizer", "adam", "optimizer", -1)
        step.free(gradient, "optimizer", -1)
        if first:
            step.first = len(step.events)
    step.trained = len(step.events)
    later = step.make(9000, "logits and loss", "mm", "evaluation", -1)
    step.free(later, "evaluation", -1)
    shape = StepShape(step)
    sizes = np.array(step.sizes)
    figures = shape.figures(sizes)
    assert weight == 0
    assert (figures.loaded, figures.after_step) == (1024, 1024 + 2 * 512)
    assert figures.training_peak == 1024 + 512 + 6144 + 1024
    assert figures.evaluation_peak == figures.peak_allocated == 1024 + 2 * 512 + 9216
    assert figures.breakdown == {"base weights": 1024, "optimizer": 1024, "logits and loss": 9216}
    assert (figures.peak_phase, figures.peak_operation) == ("evaluation", "mm")
    assert [(point.phase, point.layer, point.peak) for point in figures.timeline] == [
        ("forward", None, 1536 + 6144),
        ("backward", None, 1536 + 6144 + 1024),
        ("optimizer", None, 1536 + 1024 + 512),
        ("evaluation", None, 2048 + 9216),
    ]
    assert shape.peak_allocated(sizes) == figures.peak_allocated
    assert shape.over_gpus(sizes, 3) == 3 * figures.peak_allocated
    assert shape.peak_reserved(sizes, plainly_replayed, emptied=False) == 2 * 2**20
    # Were the weight alone on a second GPU, the figures would be those of the first, which is fuller.
    shape._gpus = np.where(shape._storages[shape.line.index] == weight, 1, 0)
    assert shape.peak_allocated(sizes) == 2 * 512 + 9216
    assert shape.over_gpus(sizes, 2) == 2 * 512 + 9216 + 1024
    assert shape.figures(sizes).breakdown == {"optimizer": 1024, "logits and loss": 9216}
    assert shape.figures(sizes).loaded == 0


# ---------------------------------------------------------------------------------- choices


def undecided(quickest: float, **setting: Any) -> tuple[Predictor, list[Point]]:
    made = object.__new__(Predictor)
    learned: list[Point] = []

    class Asked:
        def learn(self, point: Point) -> None:
            learned.append(point)

        def __call__(self, point: Point) -> Any:
            return None

    values = {
        "_quickest": quickest,
        "setting": StepSetting(1, 1, **setting),
        "_traced": {},
        "_recordings": None,
    }
    values |= {
        "_surfaces": Asked(),
        "_trace": lambda point: Traced("s", SimpleNamespace(sizes=[1], paged=0, flops=2)),
    }
    vars(made).update(values)
    return made, learned


@pytest.mark.parametrize(
    ("quickest", "loss", "learns"),
    [(2.9, "full", True), (3.0, "full", False), (31.0, "full", False), (2.9, "chunked", False)],
)
def test_further_traces_are_taken_only_where_one_is_quick(quickest: float, loss: str, learns: bool) -> None:
    made, learned = undecided(quickest, loss=loss)
    assert made._at((2, 3, 4)).sizes.tolist() == [1]
    assert learned == ([(2, 3, 4)] if learns else [])


@pytest.mark.parametrize(
    ("replays", "events", "strategy", "compiled", "late"),
    [
        (7, 200_000, None, False, False),
        (8, 200_000, None, True, False),
        (0, 200_001, None, True, False),
        (0, 5, "fsdp1", False, True),
        (0, 5, "fsdp2", False, False),
    ],
)
def test_when_the_compiled_replay_is_used(
    monkeypatch: pytest.MonkeyPatch,
    replays: int,
    events: int,
    strategy: str | None,
    compiled: bool,
    late: bool,
) -> None:
    monkeypatch.setattr(predictor, "fastest_replay", lambda: "compiled")
    monkeypatch.setattr(Predictor, "_replays", replays)
    parallel = None if strategy is None else Parallel(2, strategy)
    made, _ = undecided(1.0, parallel=parallel, empty_cache=True)
    shape: Any = SimpleNamespace(
        line=SimpleNamespace(index=range(events)), peak_reserved=lambda sizes, replay, **how: (replay, how)
    )
    replay, how = made._reserved(SimpleNamespace(shape=shape, sizes=[1]))
    assert (replay == "compiled") is compiled
    assert how == {"emptied": True, "late": late}
    assert Predictor._replays == replays + 1


@pytest.mark.parametrize(
    ("quickest", "point", "learns"),
    [(0.99, (2, 3, 4), True), (1.0, (2, 3, 4), False), (0.99, (9, 9, 9), False)],
)
def test_families_of_a_shared_step_are_learned_once_and_where_a_trace_is_quick(
    quickest: float, point: Point, learns: bool
) -> None:
    made, _ = undecided(quickest)
    learned: list[Point] = []
    asked: Any = SimpleNamespace(learn_ahead=learned.append)
    vars(made).update(_learns_ahead=True, _surfaces=asked, _traced={(2, 3, 4): None})
    for _ in range(2):
        made._learn_ahead(point)
    assert learned == [point] * learns


def test_models_of_the_last_three_ranks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(predictor, "build", lambda base, config, setting, **how: built.append(config.r))
    made, _ = undecided(1.0)
    vars(made).update(_models={}, _config=SimpleNamespace(r=1), _base=None, _cut=None, _kept=None)
    for rank in (1, 2, 3, 1, 4, 2, 3, 4):
        made._model(rank)
    assert built == [1, 2, 3, 4]
    made._model(1)
    assert built[4:] == [1]
    assert made._config.r == 1


def said(
    model: Any = None, breakdown: dict[str, int] | None = None, **setting: Any
) -> list[tuple[str, str, int]]:
    model = nn.Module() if model is None else model
    found = of_setting(StepSetting(2, 3, workspace=0, **setting), model, breakdown or {})
    return [(one.what.split(",")[0].split(" ")[0], one.bound, one.most or 0) for one in found]


def test_what_no_estimate_counts_is_said() -> None:
    assert said() == []
    assert said(args=(("activation_offloading", True),)) == [("activations", "at most", 0)]
    assert said(kernels="liger") == [("that", "at most", 0)]
    assert said(kernels="axolotl") == []
    kept = Evaluation(1, keeps="logits")
    assert said(evaluation=kept) == [("logits", "at least", 0)]
    assert said(evaluation=Evaluation(1, keeps="logits", batches=3)) == []
    assert said(evaluation=Evaluation(1)) == []
    assert said(evaluation=kept, trainer="trl-grpo") == [("generation", "at least", 0)]
    for method, bounds in (("gptq", ["at most"]), ("nf4", []), ("mxfp4", ["at most", "at least"])):
        assert [bound for _, bound, _ in said(quantization=Quantization(method))] == bounds
    whole: dict[str, Any] = {"breakdown": {"adapters": 5}, "accumulation": 2}
    assert said(**whole, parallel=Parallel(4, "fsdp1")) == [("gradients", "at least", 2 * 4 * 5)]
    assert said(**whole, parallel=Parallel(8, "hsdp", shard_size=4)) == [("gradients", "at least", 2 * 4 * 5)]
    assert said(**whole, parallel=Parallel(4, "zero3")) == []
    assert said(parallel=Parallel(4, "fsdp1")) == []
    assert said(parallel=Parallel(4, "device_map")) == [("hidden", "at least", 0)]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, ["generation, whose keys and values take 1.5 KiB or more beside the weights, is"]),
        (
            {"steps_per_generation": 4},
            ["generation, whose keys and values take 6.0 KiB or more beside the weights, is"],
        ),
        ({"use_vllm": True}, ["vLLM on the same GPU is"]),
        (
            {"use_vllm": True, "vllm_gpu_memory_utilization": 0.25},
            ["vLLM on the same GPU, which is given 25 % of the GPU, is"],
        ),
        ({"use_vllm": True, "vllm_mode": "server"}, []),
    ],
)
def test_what_generates_completions_is_said(args: dict[str, Any], words: list[str]) -> None:
    model: Any = nn.Module()
    model.config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    setting = StepSetting(2, 3, trainer="trl-grpo", args=tuple(args.items()))
    assert [one.what for one in of_setting(setting, model, {})] == words
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    inner = SimpleNamespace(**shared, head_dim=16)  # keys and values of 2 x 16 numbers, as of 4 x 8 before
    model.config = SimpleNamespace(text_config=inner)
    assert [one.what for one in of_setting(setting, model, {})] == words
    without = StepSetting(2, 3, trainer="trl-grpo")
    assert [one.what for one in of_setting(without, nn.Module(), {})] == ["generation is"]
