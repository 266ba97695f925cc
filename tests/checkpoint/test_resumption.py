"""A saved adapter beside a configuration that is to go on from it: every difference that is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig

from pytest_lora.facts.checkpoint import CheckpointFacts, FileFault
from pytest_lora.facts.config import LayerFacts
from pytest_lora.facts.saved_config import FieldChange, RankChange, ResumptionFacts
from pytest_lora.inspection.checkpoint.config_file import config_file
from pytest_lora.inspection.resumption import resumption_facts
from tests.facts.test_adapter_maps import saved


def of(modules: tuple[str, ...] = ("a.q", "b.q"), **fields: Any) -> CheckpointFacts:
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    return replace(saved(list(modules)), config=config_file({**usual, **fields}, None))


def told(facts: CheckpointFacts, layers: Any = None, **fields: Any) -> dict[str, Any]:
    """What differs, by its name."""
    usual = {"r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    found = resumption_facts(facts, LoraConfig(**{**usual, **fields}), layers)
    empty = ResumptionFacts(found.name, found.weights)
    names = ("unusable", "ranks", "gone", "new", "alpha", "base", "fields")
    return {n: getattr(found, n) for n in names if getattr(found, n) != getattr(empty, n)}


@pytest.mark.parametrize(
    ("before", "now", "differs"),
    [
        ({}, {}, {}),
        ({}, {"r": 4}, {"ranks": (RankChange(4, 2, ("a.q", "b.q")),)}),
        ({}, {"rank_pattern": {"a.q": 1}}, {"ranks": (RankChange(1, 2, ("a.q",)),)}),
        ({}, {"lora_alpha": 8}, {"alpha": ("a.q", 8.0, 4.0)}),
        ({}, {"alpha_pattern": {"b.q": 8}}, {"alpha": ("b.q", 8.0, 4.0)}),
        ({}, {"target_modules": ["v"]}, {"gone": ("a.q", "b.q"), "new": ("v",)}),
        ({}, {"target_modules": ["q", "v"]}, {"new": ("v",)}),
        ({}, {"target_modules": ["a.q"]}, {"gone": ("b.q",)}),
        ({}, {"target_modules": r"a\.q"}, {"gone": ("b.q",)}),
        ({}, {"target_modules": "all-linear"}, {}),
        ({}, {"target_modules": None}, {}),
        ({}, {"exclude_modules": ["b.q"]}, {"gone": ("b.q",)}),
        ({"exclude_modules": ["x"]}, {"exclude_modules": ["y"]},
         {"fields": (FieldChange("exclude_modules", "['y']", "['x']"),)}),
        ({"exclude_modules": []}, {}, {}),
        ({}, {"use_rslora": True}, {"fields": (FieldChange("use_rslora", "True", "False"),)}),
        ({"use_dora": True}, {}, {"fields": (FieldChange("use_dora", "False", "True"),)}),
        ({}, {"bias": "all"}, {"fields": (FieldChange("bias", "'all'", "'none'"),)}),
        ({"modules_to_save": ["score"]}, {}, {}),
        ({"modules_to_save": ["norm", "score"]}, {"modules_to_save": ["classifier", "norm"]}, {}),
        ({"modules_to_save": ["norm"]}, {}, {"fields": (FieldChange("modules_to_save", "[]", "['norm']"),)}),
        ({}, {"modules_to_save": ["norm"]}, {"fields": (FieldChange("modules_to_save", "['norm']", "[]"),)}),
        ({"layers_to_transform": [1, 0]}, {"layers_to_transform": [0, 1]}, {}),
        ({"layers_to_transform": [0]}, {"layers_to_transform": [1]},
         {"fields": (FieldChange("layers_to_transform", "[1]", "[0]"),)}),
        ({"base_model_name_or_path": "x"}, {"base_model_name_or_path": "y"}, {"base": ("y", "x")}),
        ({"base_model_name_or_path": "x"}, {"base_model_name_or_path": "x"}, {}),
        ({}, {"base_model_name_or_path": "y"}, {}),
        ({"base_model_name_or_path": "x"}, {}, {}),
        ({"target_parameters": ["p"]}, {"target_parameters": ["o"]}, {"gone": ("p",), "new": ("o",)}),
        ({"target_parameters": ["p"]}, {}, {"gone": ("p",)}),
        ({"target_parameters": ["p"]}, {"target_parameters": ["p"], "r": 1}, {}),
        ({"target_parameters": ["p"]}, {"target_parameters": ["p"], "r": 4},
         {"ranks": (RankChange(4, 2, ("a.q", "b.q")),)}),
        ({}, {"r": 1}, {"ranks": (RankChange(1, 2, ("a.q", "b.q")),)}),
    ],
)  # fmt: skip
def test_what_differs(before: dict[str, Any], now: dict[str, Any], differs: dict[str, Any]) -> None:
    assert told(of(**before), **now) == differs


def test_modules_of_a_base_tell_what_is_adapted() -> None:
    def layer(module: str) -> LayerFacts:
        return LayerFacts(module, "Linear", "default", 2, 2, 1, 1, 2, 4.0, 2.0, False, False, 0.0, 8)

    assert told(of(), [layer("a.q"), layer("b.q")], target_modules="all-linear") == {}
    assert told(of(), [layer("c.q"), layer("a.q"), layer("a.v")], target_modules=["q"]) == {
        "gone": ("b.q",),
        "new": ("a.v", "c.q"),
    }
    assert told(of(exclude_modules=["x"]), [layer("a.q"), layer("b.q")]) == {}
    assert told(of(), []) == {"gone": ("a.q", "b.q")}


@pytest.mark.parametrize(
    ("before", "now", "differs"),
    [
        ({}, {}, set()),
        ({"target_modules": ["v", "q"]}, {"target_modules": ["q", "v"]}, set()),
        ({}, {"target_modules": "all-linear"}, set()),
        ({}, {"target_modules": "q"}, {"target_modules"}),
        ({}, {"layer_replication": None}, {"layer_replication"}),
        ({}, {"r": 4, "use_rslora": True}, {"r", "use_rslora"}),
        ({"velora_config": {"scale": 1.0}}, {}, {"velora_config"}),
    ],
)  # fmt: skip
def test_a_variant_is_compared_as_it_is_written(
    before: dict[str, Any], now: dict[str, Any], differs: set[str]
) -> None:
    """Its tensors are not followed, which is no reason to call it unusable."""
    usual = {"layer_replication": [[0, 2], [1, 2]]}
    found = told(of(**{**usual, **before}), **{**usual, **now})
    assert {change.field for change in found.pop("fields", ())} == differs
    assert not found


def test_a_whole_attention_takes_its_projection_along() -> None:
    """PEFT keeps it under ``base_layer`` in the file."""
    facts = of(("mha", "mha.base_layer.out_proj"), target_modules=["mha"])
    assert told(facts, target_modules=["mha"]) == {}
    named = [
        LayerFacts(n, "Linear", "default", 2, 2, 1, 1, 2, 4.0, 2.0, False, False, 0.0, 8)
        for n in ("mha", "mha.out_proj", "b")
    ]
    assert told(facts, named, target_modules=["mha", "b"]) == {"new": ("b",)}


def test_adalora_goes_on_from_adalora() -> None:
    facts = of(peft_type="ADALORA", base_model_name_or_path="x")
    same = AdaLoraConfig(total_step=10, target_modules=["q"], base_model_name_or_path="y")
    assert resumption_facts(facts, same, None).unusable is None
    assert resumption_facts(facts, same, None).base == ("y", "x")
    assert told(facts) == {"unusable": "peft_type ADALORA"}


def test_what_nothing_can_go_on_from() -> None:
    nothing = "the folder holds no readable LoRA adapter"
    assert told(saved(["a.q"])) == {"unusable": nothing}
    assert told(replace(of(), adapted=())) == {"unusable": nothing}
    assert told(replace(of(), weights=None)) == {"unusable": nothing}
    assert told(of(peft_type="IA3")) == {"unusable": "peft_type IA3"}
    fault = FileFault("adapter_model.safetensors", "format", "it is cut off")
    assert told(replace(of(), faults=(fault,))) == {"unusable": "adapter_model.safetensors: it is cut off"}
    assert told(replace(of(), faults=(replace(fault, file="other"),))) == {}


def test_experts_that_peft_made_parameters_of_are_no_other_targets() -> None:
    """Newer transformers fuses experts; PEFT saves parameters where target modules were written, at stacked ranks."""
    parameters = {"target_modules": ["q"], "target_parameters": ["down_proj", "gate_up_proj"]}
    facts = of(("a.q",), **parameters)
    written = ["q", "gate_proj", "up_proj", "down_proj"]
    assert not told(facts, target_modules=written)
    assert told(facts, target_modules=["q"]), "here they are left out"


@pytest.mark.skipif(
    "ensure_weight_tying" not in LoraConfig.__dataclass_fields__,
    reason="this version of PEFT ties no adapters",
)
def test_modules_that_peft_ties_are_the_same_by_either_name() -> None:
    tied = {"modules_to_save": ["embed_tokens", "model.embed_tokens"], "ensure_weight_tying": True}
    facts = of(**tied)
    for names in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
        assert not told(facts, modules_to_save=names, ensure_weight_tying=True)
    assert told(facts, modules_to_save=["lm_head", "norm"], ensure_weight_tying=True)
    assert told(facts, modules_to_save=["lm_head"]), "one side alone"


def test_what_peft_makes_of_a_configuration_is_compared() -> None:
    """Ranks, targets and alphas as PEFT rewrites them on the base."""
    facts = of(rank_pattern={"b": 2}, alpha_pattern={"b": 4}, target_parameters=["down_proj"])
    applied = facts.settings
    assert applied is not None
    found = resumption_facts(facts, LoraConfig(r=2, lora_alpha=4, target_modules=["q", "w2"]), None, applied)
    assert (found.ranks, found.gone, found.new, found.alpha, found.fields) == ((), (), (), None, ())
