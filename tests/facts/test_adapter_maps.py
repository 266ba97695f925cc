"""Maps of adapters from facts: what a cell shows, and which cells there are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora.bases.examples.models import language_batch
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.figures import LossCurve, adapter_maps
from pytest_lora.facts.figures.adapter_maps import _means, checkpoint_maps, model_maps, place
from pytest_lora.facts.figures.curves import POINTS, history_curve, memory_budget
from pytest_lora.facts.figures.recipes import RecipeCard, recipe_card
from pytest_lora.facts.history import history_facts
from pytest_lora.facts.memory import MemoryEstimate, MemoryFacts, Quantization, StepSetting, Unmodelled
from pytest_lora.facts.memory_choices import Alternative, Evaluation, peak_rows
from pytest_lora.facts.recipe import RecipeFacts, RunSetting, Shard, Value
from pytest_lora.facts.saved_tensors import AdaptedModule, Key, TensorFacts, Values
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.probe import training_facts
from tests.rules.training.setups import adapted


@pytest.fixture(scope="module")
def sound() -> TrainingFacts:
    """Two steps of a small model with two layers."""
    return training_facts(adapted(), language_batch(), Plan(steps=2, rate=1e-3))


@pytest.mark.parametrize(
    ("module", "layer", "name"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0", "self_attn.q_proj"),
        ("encoder.block.3.layer.1.wi", "encoder.block.3", "layer.1.wi"),
        ("layers.2.mlp.experts.17.up_proj", "layers.2", "mlp.experts.*.up_proj"),
        ("lm_head", "", "lm_head"),
        ("model.embed_tokens", "", "model.embed_tokens"),
        ("h.11", "", "h.11"),
    ],
)
def test_modules_are_placed_by_layer_and_name(module: str, layer: str, name: str) -> None:
    assert place(module) == (layer, name)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "live"),
        ({"adapter": "other"}, "idle"),
        ({"active": False}, "idle"),
        ({"disabled": True}, "idle"),
        ({"merged": True}, "idle"),
        ({"scaling": 0.0}, "dead"),
    ],
)
def test_the_state_of_a_cell(sound: TrainingFacts, changes: dict[str, Any], state: str) -> None:
    layers = (replace(sound.model.layers[0], **changes), *sound.model.layers[1:])
    facts = replace(sound.model, layers=layers, adapters=("default", "other"))
    found = next(one for one in model_maps(facts) if one.adapter == changes.get("adapter", "default"))
    assert found.states[0] == state
    shown = next(one for one in model_maps(sound.model, sound) if one.adapter == "default")
    assert shown.states == ("live",) * 4


def test_cells_that_saw_no_gradient_are_dead_but_for_experts(sound: TrainingFacts) -> None:
    first = sound.model.layers[0]
    silent = tuple(replace(t, gradients=(0.0,)) if t.module == first.module else t for t in sound.tensors)
    facts = replace(sound, tensors=silent)
    assert model_maps(facts.model, facts)[0].states == ("dead", "live", "live", "live")
    assert model_maps(facts.model)[0].states == ("live",) * 4
    expert = replace(first, module="model.layers.0.experts.0.up_proj")
    untaught = replace(facts, model=replace(facts.model, layers=(expert, *facts.model.layers[1:])))
    row = model_maps(untaught.model, untaught)[0]
    assert row.column("experts.*.up_proj", row.states)[0] == "live"
    outside = replace(untaught, untouched=(expert.module,))
    row = model_maps(outside.model, outside)[0]
    assert row.column("experts.*.up_proj", row.states)[0] == "dead"


def test_gradients_and_updates_are_of_both_factors(sound: TrainingFacts) -> None:
    first = sound.model.layers[0]
    parts = {"a": (3.0, 1, 4.0), "b": (4.0, 3, 2.0), "base": (90.0, 9, 90.0)}
    tensors = tuple(
        replace(
            sound.tensors[0],
            module=first.module,
            part=part,
            gradients=(9.0, gradient),
            numbers=numbers,
            moves=(9.0, move),
        )
        for part, (gradient, numbers, move) in parts.items()
    )
    (found,) = model_maps(sound.model, replace(sound, tensors=tensors))
    assert found.gradients == (5.0, None, None, None)
    assert found.updates == (float(f"{math.sqrt((16 + 3 * 4) / 4):.4g}"), None, None, None)
    (none,) = model_maps(sound.model, replace(sound, tensors=tensors, steps=()))
    assert none.gradients == none.updates == ()
    still = tuple(replace(t, gradients=(), moves=()) for t in tensors)
    (quiet,) = model_maps(sound.model, replace(sound, tensors=still))
    assert (quiet.gradients[0], quiet.updates[0]) == (0.0, 0.0)


def test_several_experts_are_one_cell_of_the_worst(sound: TrainingFacts) -> None:
    first = sound.model.layers[0]
    experts = tuple(
        replace(first, module=f"model.layers.0.experts.{i}.up", rank=rank, scaling=scaling, merged=merged)
        for i, (rank, scaling, merged) in enumerate([(8, 2.0, False), (4, 3.0, False), (16, 2.5, True)])
    )
    (found,) = model_maps(replace(sound.model, layers=experts))
    place = found.columns.index("experts.*.up")
    assert (found.states[place], found.ranks[place], found.scalings[place]) == ("idle", 4, 2.0)


@pytest.mark.parametrize(("count", "shown"), [(8, 8), (9, 8)])
def test_eight_adapters_are_shown_the_active_ones_first(sound: TrainingFacts, count: int, shown: int) -> None:
    names = tuple(f"n{i}" for i in range(count))
    layers = tuple(replace(sound.model.layers[0], adapter=name) for name in names)
    maps = model_maps(replace(sound.model, layers=layers, adapters=names, active=names[-1:]))
    assert len(maps) == shown
    assert maps[0].adapter == names[-1]
    assert len(model_maps(replace(sound.model, layers=layers[:1], adapters=names))) == 1


def saved(modules: list[str], zero: bool = False) -> CheckpointFacts:
    """A saved adapter of rank 2 on these modules."""
    values = Values(0, 0, zero, rms=0.123456)
    tensors = [
        TensorFacts(f"base_model.model.{module}.lora_{part}.weight", "F32", (2, 2), values)
        for module in modules
        for part in "AB"
    ]
    pairs = zip(modules, tensors[::2], tensors[1::2], strict=True)
    return CheckpointFacts(
        name="it",
        entries=(),
        config=None,
        weights="adapter_model.safetensors",
        pickled=False,
        tensors=tuple(tensors),
        faults=(),
        adapted=tuple(AdaptedModule(module, a, b, None, None) for module, a, b in pairs),
        keys={tensor.name: Key.of(tensor.name) for tensor in tensors},
    )


GRID = [f"layers.{row}.{column}" for row in range(2) for column in ("q", "v")]


@pytest.mark.parametrize(("most", "is_shown"), [(4, True), (3, False)])
def test_names_of_a_file_that_form_no_map_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, most: int, is_shown: bool
) -> None:
    monkeypatch.setattr(adapter_maps, "MOST_CELLS", most)
    assert bool(checkpoint_maps(saved(GRID))) is is_shown
    assert not checkpoint_maps(saved([]))


def test_a_file_is_a_map_with_the_size_of_its_updates() -> None:
    (found,) = checkpoint_maps(saved([*GRID[:3], "layers.1.v.base_layer"]))
    assert (found.rows, found.columns) == (("layers.0", "layers.1"), ("q", "v"))
    assert found.base == "a base that is not given"
    assert (found.ranks, found.scalings, found.updates) == ((2,) * 4, (None,) * 4, (0.1235,) * 4)
    assert (found.trainable_parameters, found.total_parameters, found.percent, found.saved) == (
        32,
        0,
        0.0,
        True,
    )
    assert checkpoint_maps(saved(GRID, zero=True))[0].states == ("dead",) * 4
    (part,) = checkpoint_maps(saved(GRID[:3]))
    assert part.states == ("live", "live", "live", None)
    assert checkpoint_maps(replace(saved(GRID), weights=None)) == ()


# ------------------------------------------------------------------ curves


@pytest.mark.parametrize(
    ("count", "kept"), [(1, 1), (POINTS, POINTS), (POINTS + 1, None), (10 * POINTS, POINTS)]
)
def test_long_histories_keep_the_lowest_and_the_highest_of_each_stretch(count: int, kept: int | None) -> None:
    losses = [2 + math.sin(i * i) for i in range(count)]
    losses[count // 2] = math.nan
    curve = history_curve("it", history_facts(losses))
    assert len(curve.steps) <= POINTS + 1
    assert kept is None or abs(len(curve.steps) - kept) <= 1
    assert (count // 2 + 1) in curve.steps
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        assert (min(finite), max(finite)) == (
            min(loss for loss in curve.losses if math.isfinite(loss)),
            max(loss for loss in curve.losses if math.isfinite(loss)),
        )
    assert all(
        curve.losses[i] == losses[step - 1] or math.isnan(curve.losses[i])
        for i, step in enumerate(curve.steps)
    )


@pytest.mark.parametrize(
    ("before", "after", "drop"),
    [
        (4.0, 3.0, 0.25),
        (4.0, 5.0, -0.25),
        (0.0, 1.0, None),
        (None, 1.0, None),
        (4.0, None, None),
        (4.0, math.nan, None),
    ],
)
def test_the_drop_of_a_curve_is_relative(
    before: float | None, after: float | None, drop: float | None
) -> None:
    assert LossCurve("it", (), (), (), (), (0, 1), before, after, None).drop == drop


# ------------------------------------------------------------------ budgets


def test_a_step_against_the_memory_there_is() -> None:
    setting = StepSetting(4, 2048, Quantization("nf4"), gradient_checkpointing=True)
    assert setting.workspace == 1024 * (2 * 4096 + 8 * 16)  # CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8
    assert (setting.images, setting.accumulation, Quantization("awq").bits) == (1, 1, 4)
    names = {"base weights": 3, "adapters": 0}
    estimate = MemoryEstimate(setting, "Model", 8, 100, 120, 3, 4, names, "forward", "matmul", (), 0, 0)
    tried = tuple(Alternative((f"change {peak}",), peak, 1) for peak in (99, 100, 101))
    found = memory_budget(MemoryFacts(estimate, 100, tried))
    assert found.title == (
        "Model, batch 4 x 2048 tokens, r=8, base in nf4, adamw_torch, gradient checkpointing"
    )
    assert (found.breakdown, found.fits, found.peak_at) == (
        (("base weights", 3),),
        True,
        "forward: matrix product",
    )
    assert (found.peak_allocated, found.peak_reserved, found.budget) == (100, 120, 100)
    assert [(one.change, one.fits) for one in found.what_if] == [
        ("change 99", True),
        ("change 100", True),
        ("change 101", False),
    ]
    assert not replace(found, budget=99).fits
    assert (estimate.over_ranks, estimate.training_peak, estimate.evaluation_peak) == (0, 0, 0)
    assert (estimate.bound, estimate.is_mostly_whole) == (None, True)
    packed = replace(
        estimate, breakdown={"base weights": 3, "quantized base weights": 2, "parameter shards": 1}
    )
    assert not packed.is_mostly_whole
    assert replace(estimate, breakdown={"base weights": 1}).is_mostly_whole
    assert not replace(estimate, breakdown={}).is_mostly_whole
    bounds = [Unmodelled("a", "at least"), Unmodelled("b", "at least"), Unmodelled("c", "at most")]
    assert [replace(estimate, unmodelled=tuple(bounds[:count])).bound for count in (1, 2, 3)] == [
        "at least", "at least", "about",
    ]  # fmt: skip
    plain = replace(estimate, setting=StepSetting(1, 8, dtype="float16"), has_tokens=False)
    assert memory_budget(MemoryFacts(plain, 100)).title == "Model, batch 1, r=8, base in float16, adamw_torch"


def test_the_share_of_what_is_trained() -> None:
    (found,) = checkpoint_maps(saved(GRID))
    assert replace(found, trainable_parameters=3, total_parameters=60).percent == 5.0
    assert found.column("v", found.ranks) == (2, 2)


# ------------------------------------------------------------------ recipes


def a_recipe(**values: Any) -> RecipeFacts:
    setting = RunSetting("TRL", **{name: Value(value, "line 1") for name, value in values.items()})
    return RecipeFacts("a.yaml", tool="TRL", setting=setting)


@pytest.mark.parametrize(
    ("values", "gpus", "steps"),
    [
        ({"batch_size": 2}, 1, [("sequences a step", "2 (2 x 1 accumulated)")]),
        ({"batch_size": 200, "accumulation": 4, "seq_len": 512}, 2,
         [("sequences a step", "1,600 (200 x 4 accumulated x 2 GPUs)"), ("tokens a step, at most", "819,200")]),
        ({"batch_size": "x", "seq_len": 512}, 1, []),
        ({"batch_size": 2, "accumulation": "x"}, 1, []),
        ({"max_steps": 1000, "epochs": 3.0}, 1, [("optimizer steps", "1,000")]),
        ({"max_steps": 1, "epochs": 3.0}, 1, [("optimizer steps", "1")]),
        ({"max_steps": 0, "epochs": 1.5}, 1, [("epochs", "1.5")]),
        ({"max_steps": -1, "epochs": 3}, 1, [("epochs", "3")]),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, 1, [("warm-up", "10 steps")]),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, 1, [("warm-up", "0.1 of the steps")]),
        ({"warmup_ratio": 0.0}, 1, []),
    ],
)  # fmt: skip
def test_what_the_step_of_a_recipe_is_made_of(
    values: dict[str, Any], gpus: int, steps: list[tuple[str, str]]
) -> None:
    card = recipe_card(a_recipe(**values), gpus)
    assert card is not None
    assert (list(card.steps), card.gpus) == (steps, gpus)


@pytest.mark.parametrize(
    ("peak", "budget", "shard", "may_fit", "seen"),
    [
        (None, None, None, False, (None, None, "")),
        (5, None, None, False, (5, None, "")),
        (None, 5, None, False, (None, None, "")),
        (5, 5, None, False, (5, True, "")),
        (6, 5, None, False, (6, False, "")),
        (6, 5, None, True, (6, None, "TRL's own kernels take less, and it may fit")),
        (None, 5, Shard(20, 5, 4), False, (5, None, "the weights of the base alone")),
        (None, 5, Shard(21, 5, 4), False, (5, False, "the weights of the base alone")),
        (6, 5, Shard(20, 5, 4), False, (6, False, "")),
    ],
)
def test_whether_a_recipe_fits(peak: Any, budget: Any, shard: Any, may_fit: bool, seen: Any) -> None:
    card = recipe_card(replace(a_recipe(), shard=shard), 4, peak, budget, may_fit=may_fit)
    assert card is not None
    assert (card.peak, card.fits, card.note) == seen
    assert recipe_card(RecipeFacts("a.yaml")) is None
    assert RecipeCard("a", "TRL", (), ()).gpus == 1


def test_values_in_a_card_and_the_scaling_of_a_run() -> None:
    card = recipe_card(a_recipe(r=8, lora_alpha=0.00001, target_modules=("q", "v"), dtype=None))
    assert card is not None
    assert [(row.name, row.value) for row in card.rows] == [
        ("dtype", "-"), ("r", "8"), ("lora_alpha", "1e-05"), ("target_modules", "q, v"),
    ]  # fmt: skip
    for values, scaling in (
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 1, "lora_alpha": 8}, 8.0),
        ({"r": 0, "lora_alpha": 8}, None),
        ({"r": None, "lora_alpha": 8}, None),
        ({"r": 4, "lora_alpha": None}, None),
    ):
        setting = a_recipe(**values).setting
        assert setting is not None
        assert setting.scaling == scaling


def test_an_evaluation_in_words_and_beside_the_training() -> None:
    assert Evaluation(8, 512).in_words() == "an evaluation by 8 x 512 tokens, which keeps the loss"
    assert Evaluation(8, 512).in_words(with_tokens=False) == "an evaluation by 8, which keeps the loss"
    assert Evaluation(8).in_words() == "an evaluation by 8, which keeps the loss"
    for name, most in (("batch_size", 2**28), ("seq_len", 2**24), ("batches", 2**28)):
        for value, fine in ((1, True), (most, True), (0, False), (most + 1, False)):
            if fine:
                assert Evaluation(**{"batch_size": 1, name: value})
            else:
                with pytest.raises(ValueError, match=f"^{name} must be"):
                    Evaluation(**{"batch_size": 1, name: value})
    with pytest.raises(TypeError, match=r"^batch_size must be"):
        Evaluation(None)
    assert peak_rows(0, 3, 5) == (("peak allocated", 5),)
    assert peak_rows(4, 3, 5) == (("peak of the training", 3), ("peak allocated, of the evaluation", 4))
    assert peak_rows(3, 4, 5) == (("peak of the evaluation", 3), ("peak allocated, of the training", 4))


def test_modules_in_one_place_are_drawn_by_their_mean() -> None:
    def cell(gradient: float | None) -> Any:
        return "live", 4, 1.0, gradient, None

    grid = [[cell(2.0), cell(4.0), cell(None)], [cell(None)]]
    assert _means(grid, 3) == (3.0, None)
    assert _means(grid, 4) == ()
