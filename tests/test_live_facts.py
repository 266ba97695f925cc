"""A live model as facts, on a toy of a few numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from pytest_lora.facts.model import SavedModule, TrainableBase
from pytest_lora.inspection import base_values
from pytest_lora.inspection.base import base_facts, base_parameters
from pytest_lora.inspection.layers import layer_states
from pytest_lora.inspection.model import carries_lora, model_facts
from pytest_lora.inspection.peft_internals import (
    LoraLayer,
    adapted_weight,
    dense_weight,
    freeze,
    frozen_factors,
    further_tensors,
    own_code,
    own_geometry,
    store_adapter,
)
from pytest_lora.inspection.survey import survey
from tests.test_asking_peft import Toy


def adapted(base: nn.Module | None = None, **fields: Any) -> Any:
    usual = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return get_peft_model(Toy() if base is None else base, LoraConfig(**{**usual, **fields}))


def first(model: nn.Module) -> LoraLayer:
    return next(iter(survey(model).lora.values()))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, []),
        ({"lora_bias": True}, ["lora_B.bias"]),
        ({"use_dora": True}, ["lora_magnitude_vector"]),
    ],
)
def test_what_a_layer_trains_beside_its_factors(fields: dict[str, Any], names: list[str]) -> None:
    base = nn.Sequential(nn.Linear(4, 6))
    model = adapted(base, **{**fields, "target_modules": ["0"]})
    layer: Any = first(model)
    assert [name for name, _ in further_tensors(layer, "default")] == names
    assert not own_geometry(layer, "default")
    layer.lora_variant["default"] = object()
    assert own_geometry(layer, "default")
    (state,) = layer_states(survey(model).layers)
    assert state.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    model.add_adapter("plain", LoraConfig(target_modules=["0"]))
    assert list(further_tensors(layer, "plain")) == []


def test_the_weight_that_is_adapted() -> None:
    layer: Any = first(adapted())
    assert dense_weight(layer) is not None
    assert torch.equal(dense_weight(layer), layer.base_layer.weight)
    layer.base_layer.to("meta")
    assert dense_weight(layer) is None
    attention: Any = first(adapted(nn.Sequential(nn.MultiheadAttention(4, 2)), target_modules=["0"]))
    assert adapted_weight(attention) is attention.base_layer.in_proj_weight
    (state,) = layer_states([("0", attention)])
    assert (state.base_device, state.out_features) == ("cpu", 12)


def test_adapters_kept_in_another_dtype() -> None:
    for magnitudes in (False, True):
        model = adapted(use_dora=True, modules_to_save=["lm_head"])
        store_adapter(model, torch.bfloat16, magnitudes=magnitudes)
        kept = {name: p.dtype for name, p in model.named_parameters()}
        assert {dtype for name, dtype in kept.items() if "lora_A" in name or "lora_B" in name} == {
            torch.bfloat16
        }
        assert {dtype for name, dtype in kept.items() if "magnitude" in name} == {
            torch.bfloat16 if magnitudes else torch.float32
        }
        assert {dtype for name, dtype in kept.items() if "lora_" not in name} == {torch.float32}


@pytest.mark.parametrize(
    ("names", "frozen"),
    [
        (("lora_A",), 2),
        (("lora_A", "lora_B"), 4),
        (("base_model.model.layers.0.q_proj.lora_B.default.weight",), 1),
        (("lora", "ora_A", "q_pro"), 0),
    ],
)
def test_parts_of_adapters_are_frozen_by_their_names(names: tuple[str, ...], frozen: int) -> None:
    model = adapted()
    freeze(model, names)
    own = [p for name, p in model.named_parameters() if "lora_" in name]
    assert sum(not p.requires_grad for p in own) == frozen


LAYER = "base_model.model.layers.{}.q_proj.{}"


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("lora_A",),
        ("lora_A", "lora_B"),
        (LAYER.format(0, "lora_A"),),
        ("lora_B", LAYER.format(1, "lora_A")),
    ],
)
def test_what_is_frozen_of_active_adapters_is_told_by_names_that_freeze_it(names: tuple[str, ...]) -> None:
    model = adapted()
    model.add_adapter("idle", LoraConfig(r=2, target_modules=["q_proj"]))
    freeze(model, names)
    assert set(frozen_factors(model)) == set(names)


def test_code_that_is_not_pefts() -> None:
    class Own(type(first(adapted()))):
        pass

    layer: Any = first(adapted())
    assert own_code(layer) == ""
    layer.forward = lambda x: x
    assert own_code(layer) == "forward"
    layer._hf_hook = 1
    assert own_code(layer) == ""
    layer.__class__ = Own
    assert own_code(layer).endswith(".Own")


def test_models_made_for_lora() -> None:
    assert carries_lora(adapted())
    assert not carries_lora(Toy())
    model = adapted()
    model.base_model.unload()
    assert carries_lora(model)
    assert model_facts(model).layers == ()
    with pytest.raises(TypeError, match="model must carry LoRA layers"):
        model_facts(Toy())


# ------------------------------------------------------------------ geometry


@pytest.mark.parametrize(
    ("module", "fields", "sizes", "kernel", "expected_a", "expected_b"),
    [
        (nn.Linear(4, 6), {}, (4, 6), 1, (2, 4), (6, 2)),
        (nn.Embedding(9, 4), {}, (9, 4), 1, (4, 2), (2, 9)),
        (nn.Conv2d(4, 6, 3), {}, (4, 6), 9, (2, 4), (6, 2)),
        (nn.Conv2d(4, 6, 3, groups=2), {}, (4, 6), 9, (2, 4), (6, 1)),
        (nn.Conv1d(4, 6, 5), {}, (4, 6), 5, (2, 4), (6, 2)),
    ],
)
def test_geometry_of_an_adapter(
    module: nn.Module, fields: Any, sizes: Any, kernel: int, expected_a: Any, expected_b: Any
) -> None:
    model = adapted(nn.Sequential(module), **{"target_modules": ["0"], "lora_dropout": 0.5, **fields})
    (state,) = layer_states(survey(model).layers)
    assert ((state.in_features, state.out_features), state.kernel, state.experts) == (sizes, kernel, 1)
    assert (state.expected_a, state.expected_b) == (expected_a, expected_b)
    assert (state.a.shape[:2], state.b.shape[:2]) == (expected_a, expected_b)
    assert (state.rank, state.alpha, state.scaling, state.dropout, state.dropout_live) == (
        2,
        4.0,
        2.0,
        0.5,
        True,
    )
    assert (state.a.zero, state.b.zero, state.use_rslora, state.use_dora) == (False, True, False, False)
    assert state.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert (state.empty_ranks, state.idle_ranks, state.zero_outputs) == (0, 0, 0)
    assert (state.base_device, state.active, state.disabled, state.merged) == ("cpu", True, False, False)
    model.eval()
    (still,) = layer_states(survey(model).layers)
    assert not still.dropout_live
    (plain,) = layer_states(survey(adapted()).layers[:1])
    assert (plain.dropout, plain.dropout_live) == (0.0, False)


@pytest.mark.parametrize(
    ("rank", "alpha", "use_rslora", "scaling"),
    [
        (4, 8, True, 4.0),
        (4, 8, False, 2.0),
        (2, 8, True, 8 / math.sqrt(2)),
        (1, 8, True, 8.0),
        (1, 8, False, 8.0),
    ],
)
def test_rslora_is_told_by_the_layer_or_by_its_scaling(
    rank: int, alpha: int, use_rslora: bool, scaling: float
) -> None:
    layer: Any = first(adapted(r=rank, lora_alpha=alpha, use_rslora=use_rslora))
    (known,) = layer_states([("q", layer)])
    is_noted = hasattr(layer, "use_rslora")  # which older PEFT does not
    assert (known.use_rslora, known.scaling) == (use_rslora and (is_noted or rank > 1), scaling)
    layer.use_rslora = None  # as in PEFT that keeps no record
    (seen,) = layer_states([("q", layer)])
    assert seen.use_rslora is (use_rslora and rank > 1)
    layer.scaling["default"] = layer.lora_alpha["default"] = 0.0
    assert not next(layer_states([("q", layer)])).use_rslora


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_that_are_elsewhere_are_expected_as_they_are_stored(factor: str) -> None:
    """A rank of the first FSDP may hold the numbers of one factor and none of the other's."""
    model = adapted()
    layer: Any = first(model)
    getattr(layer, factor)["default"].weight.data = torch.empty(0)
    state = next(layer_states(survey(model).layers))
    stored = {"lora_A": (2, 4), "lora_B": (6, 2), factor: (0, 0)}
    assert (state.expected_a, state.expected_b) == (stored["lora_A"], stored["lora_B"])


# ------------------------------------------------------------------ the base


def test_parameters_of_the_base_that_train() -> None:
    def trains(*names: str, **fields: Any) -> tuple[TrainableBase, ...]:
        model = adapted(**fields)
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.requires_grad_(True)
        return model_facts(model).trainable_base

    assert trains("nothing") == ()
    assert trains("embed.weight") == (TrainableBase("embed.weight", 36),)
    assert trains("lm_head.bias") == (TrainableBase("lm_head.bias", 9),)
    assert trains("lm_head.bias", bias="all") == ()
    only = {"bias": "lora_only", "target_modules": ["v_proj"]}
    assert trains("nothing", **only) == ()
    assert trains("lm_head.bias", **only) == (TrainableBase("lm_head.bias", 9),)
    assert trains("norm.weight", bias="all") == tuple(
        TrainableBase(f"layers.{n}.norm.weight", 4) for n in (0, 1)
    )


@pytest.mark.parametrize(
    ("most", "told"), [(35, ()), (36, ("embed.weight",)), (10_000, ("embed.weight", "lm_head.bias"))]
)
def test_numbers_of_the_base_that_are_not_finite(
    monkeypatch: pytest.MonkeyPatch, most: int, told: tuple[str, ...]
) -> None:
    model = adapted()
    assert model_facts(model).nonfinite_base == ()
    base = model.base_model.model
    with torch.no_grad():
        base.embed.weight[0, 0], base.lm_head.bias[0] = math.nan, math.inf
    monkeypatch.setattr(base_values, "CPU_NUMBERS", most)
    assert model_facts(model).nonfinite_base == told


def test_modules_that_drop_something() -> None:
    base = Toy()
    base.add_module("drop", nn.Dropout(0.1))
    base.add_module("keep", nn.Dropout(0.0))
    base.layers[0].attention_dropout = 0.1
    base.layers[1].attention_dropout = 0.0
    model = adapted(base)
    assert model_facts(model).base_dropouts == ("layers.0", "drop")
    model.eval()
    assert model_facts(model).base_dropouts == ()


def test_adapters_that_are_alike() -> None:
    model = adapted(init_lora_weights=False)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for factors in (module.lora_A, module.lora_B):
                factors["b"].load_state_dict(factors["default"].state_dict())
    assert model_facts(model).duplicates == ()
    model.base_model.set_adapter(["default", "b"])
    assert model_facts(model).duplicates == (("b", "default"),)
    layer: Any = first(model)
    with torch.no_grad():
        layer.lora_B["b"].weight[0, 0] += 1
    assert model_facts(model).duplicates == ()


def test_modules_and_rows_that_are_trained_in_full() -> None:
    model = adapted(modules_to_save=["lm_head"], trainable_token_indices={"embed": [1, 2, 5]})
    facts = model_facts(model)
    assert [replace(one, tied_by_loading=False) for one in facts.saved] == [
        SavedModule("lm_head", "default", True, True, (9, 4), (9, 4), "float32", True, False, (), False)
    ]
    (rows,) = facts.rows
    assert (rows.module, rows.rows, rows.trainable, rows.finite, rows.dtype, rows.active) == (
        "embed", 3, True, True, "float32", True,
    )  # fmt: skip
    assert (facts.configs[0].saved_modules, facts.configs[0].token_modules) == (("lm_head",), ("embed",))
    assert facts.trainable_parameters == 2 * 20 + 45 + 3 * 4
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].bias[0] = math.nan
    assert not model_facts(model).saved[0].finite


def test_copies_and_rows_of_adapters_that_take_no_part_are_not_active() -> None:
    fields: dict[str, Any] = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed": [1]}}
    model = adapted(**fields)
    model.add_adapter("idle", LoraConfig(r=2, target_modules=["q_proj"], **fields))

    def active() -> set[tuple[str, bool]]:
        facts = model_facts(model)
        return {(one.adapter, one.active) for one in (*facts.saved, *facts.rows)}

    assert active() == {("default", True), ("idle", False)}
    model.base_model.disable_adapter_layers()
    assert active() == {("default", False), ("idle", False)}


def test_an_adapter_that_is_called_like_a_module_is_told_with_that_module() -> None:
    model = get_peft_model(Toy(), LoraConfig(target_modules=["q_proj"]), adapter_name="q_proj")
    assert [(one.adapter, one.part) for one in model_facts(model).colliding] == [
        ("q_proj", "layers.0.q_proj")
    ]
    assert not model_facts(adapted()).colliding


@pytest.mark.parametrize("name", ["q_proj", "lora_A", "weight", "model"])
def test_what_a_name_loses_is_what_peft_saves_otherwise_under_a_harmless_one(name: str) -> None:
    def two(called: str) -> Any:
        model = get_peft_model(Toy(), LoraConfig(target_modules=["q_proj"]), adapter_name=called)
        model.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
        return model

    def saved(model: Any, adapter: str) -> set[str]:
        try:
            return {key for key in get_peft_model_state_dict(model, adapter_name=adapter) if "lora_" in key}
        except Exception:  # some versions refuse such a name
            return set()

    named, harmless = two(name), two("harmless")
    wrong = {"other": saved(named, "other") ^ saved(harmless, "other")}
    wrong[name] = saved(named, name) ^ saved(harmless, "harmless")
    (found,) = model_facts(named).colliding
    assert set(found.lost) == wrong["other"] | wrong[name]
    assert set(found.adapters) == {adapter for adapter, keys in wrong.items() if keys}


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"load_in_4bit": True}, "4bit"),
        ({"_load_in_4bit": True}, "4bit"),
        ({"load_in_8bit": True}, "8bit"),
        ({"load_in_4bit": False}, None),
    ],
)
def test_what_a_base_says_of_its_quantization(config: dict[str, Any], bits: str | None) -> None:
    model: Any = Toy()
    model.config = type(
        "Config", (), {"quantization_config": {**config, "llm_int8_skip_modules": ["head"]}}
    )()
    found = survey(model)
    said = base_facts(found, base_parameters(found)).quantization
    assert (said.declared, said.skipped) == (bits, ("head",)) if said is not None else bits is None
    assert (said is None) is (bits is None)
