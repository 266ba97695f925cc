"""Rules on saved adapters where they turn, on facts of a file made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_lora import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts, Entry, FileFault
from pytest_lora.facts.saved_tensors import Key, TensorFacts, Values
from pytest_lora.inspection.checkpoint.config_file import config_file
from pytest_lora.rules import find
from tests.facts.test_adapter_maps import saved


def said(rule: str, facts: CheckpointFacts) -> list[str]:
    judge = find(rule)
    assert judge is not None
    return [f"{one.severity}: {one.observed}" for one in judge(facts, Expect())]


def configured(facts: CheckpointFacts, **fields: Any) -> CheckpointFacts:
    return replace(
        facts, config=config_file({"peft_type": "LORA", "r": 2, "target_modules": ["q"], **fields}, None)
    )


def with_tensors(facts: CheckpointFacts, *tensors: TensorFacts) -> CheckpointFacts:
    every = (*facts.tensors, *tensors)
    return replace(facts, tensors=every, keys={one.name: Key.of(one.name) for one in every})


@pytest.mark.parametrize(
    ("layers", "fields", "observed"),
    [
        ((0, 1, 2, 4), {}, ["info: layers 3 are missing between layers that the file has"]),
        ((0, 2, 3), {}, []),
        ((1, 2, 3, 4), {}, ["info: layers 0 are missing between layers that the file has"]),
        ((0, 1, 2, 3), {}, []),
        ((0, 1, 2, 5), {}, []),
        ((0, 1, 2, 3, 4, 5, 6, 9), {}, ["info: layers 7, 8 are missing between layers that the file has"]),
        ((0, 1, 2, 3, 4, 5, 6, 10), {}, []),
        ((0, 1, 2, 4), {"target_modules": r".*\.q"}, []),
        ((0, 1, 2, 4), {"target_modules": ["layers.0.q"]}, []),
        ((0, 1, 2, 4), {"layers_to_transform": [0, 1, 2, 4]}, []),
    ],
)
def test_gaps_between_layers(layers: tuple[int, ...], fields: dict[str, Any], observed: list[str]) -> None:
    facts = configured(saved([f"model.layers.{number}.q" for number in layers]), **fields)
    assert said("layers_are_missing", facts) == observed


def test_a_layer_of_many_missing_ones_is_written_out_eight_times() -> None:
    layers = [number for number in range(60) if number not in range(20, 32, 1)]
    (found,) = said("layers_are_missing", configured(saved([f"layers.{number}.q" for number in layers])))
    assert found == "info: layers 20, 21, 22, 23, 24, 25, 26, 27 are missing between layers that the file has"


@pytest.mark.parametrize(
    ("nans", "infinities", "kinds"),
    [(1, 1, "1 NaN and 1 infinite"), (2, 0, "2 NaN"), (0, 3, "3 infinite"), (0, 0, None)],
)
def test_numbers_that_are_not_finite(nans: int, infinities: int, kinds: str | None) -> None:
    odd = TensorFacts("base_model.model.q.lora_A.weight", "F32", (2, 2), Values(nans, infinities, False))
    found = said("saved_adapter_is_not_finite", with_tensors(saved(["v"]), odd))
    assert found == ([] if kinds is None else [f"error: {kinds} values in 1 of 3 tensors"])


@pytest.mark.parametrize(
    ("base_class", "head", "to_save", "is_told"),
    [
        ("LlamaForSequenceClassification", False, [], True),
        ("LlamaForSequenceClassification", True, [], False),
        ("LlamaForSequenceClassification", False, ["score"], False),
        ("LlamaForCausalLM", False, [], False),
        (None, False, [], False),
    ],
)
def test_a_head_without_a_base(base_class: str | None, head: bool, to_save: list[str], is_told: bool) -> None:
    facts = configured(saved(["q"]), modules_to_save=to_save, auto_mapping={"base_model_class": base_class})
    if head:
        facts = with_tensors(facts, TensorFacts("base_model.model.score.weight", "F32", (2, 2), None))
    assert bool(said("head_is_not_in_the_file", facts)) is is_told


@pytest.mark.parametrize(
    ("to_save", "held", "is_told"),
    [
        (["classifier", "score"], "score", False),
        (["classifier", "score"], None, True),
        # T5 and BART call it so, and PEFT adds its own two names all the same.
        (["classification_head", "classifier", "score"], "classification_head.dense", False),
        (["classification_head", "classifier", "score"], None, True),
        (["norm", "classifier", "score"], "norm", True),
    ],
)
def test_a_head_of_the_task_type_without_a_base(to_save: list[str], held: str | None, is_told: bool) -> None:
    facts = configured(saved(["q"]), modules_to_save=to_save, task_type="SEQ_CLS")
    if held:
        facts = with_tensors(facts, TensorFacts(f"base_model.model.{held}.weight", "F32", (2, 2), None))
    assert bool(said("saved_module_is_not_in_the_file", facts)) is is_told


def test_a_field_that_is_unusable_is_told_once() -> None:
    facts = configured(saved(["q"]), r=0)
    (told,) = said("config_field_is_unusable", facts)
    assert told == "error: r is 0, not a whole number above 0"
    fault = FileFault("adapter_config.json", "pattern", "it takes for ever")
    assert not said("config_field_is_unusable", replace(facts, faults=(fault,)))
    other = replace(fault, kind="size")
    assert said("config_field_is_unusable", replace(facts, faults=(other,)))
    assert not said("config_field_is_unusable", configured(saved(["q"])))


@pytest.mark.parametrize(
    ("names", "shards", "merged", "pickles"),
    [
        (["adapter_model-00001-of-00002.safetensors"], 1, 0, 0),
        (["adapter_model-1-of-2.safetensors"], 0, 0, 0),
        (["model.safetensors", "model-00001-of-00002.safetensors"], 0, 2, 0),
        (["pytest_model.bin", "pytorch_model.bin", "a.pt"], 0, 1, 3),
        (["model.safetensors.index.json"], 0, 1, 0),
        (["my_model.safetensors"], 0, 0, 0),
    ],
)
def test_files_by_their_names(names: list[str], shards: int, merged: int, pickles: int) -> None:
    facts = replace(saved(["q"]), entries=tuple(Entry(name, "file", 1) for name in names))
    assert (len(facts.shards), len(facts.merged), len(facts.pickles)) == (shards, merged, pickles)
    folders = replace(facts, entries=tuple(replace(one, kind="folder") for one in facts.entries))
    assert (folders.shards, folders.merged, folders.pickles) == ((), (), ())


@pytest.mark.parametrize(
    ("ours", "theirs", "weights", "is_other"),
    [
        (10_000, 10_000 + 4096 + 2048, "adapter_model.safetensors", False),
        (10_000, 10_000 + 4096 + 2049, "adapter_model.safetensors", True),
        (10_000 + 4096 + 2049, 10_000, "adapter_model.safetensors", True),
        (10_000, None, "adapter_model.safetensors", False),
        (10_000, 90_000, "other.safetensors", False),
    ],
)
def test_another_pickle_has_another_size(ours: int, theirs: int | None, weights: str, is_other: bool) -> None:
    sizes = {"adapter_model.safetensors": ours, "adapter_model.bin": theirs}
    entries = tuple(Entry(name, "file", size) for name, size in sizes.items() if size is not None)
    facts = replace(saved(["q"]), entries=entries, weights=weights)
    assert (facts.other_pickle is not None) is is_other


def test_what_a_file_is_judged_as() -> None:
    facts = configured(saved(["q"]))
    assert facts.is_judged
    assert not replace(facts, weights=None).is_judged
    broken = FileFault("adapter_model.safetensors", "format", "it is none")
    assert not replace(facts, faults=(broken,)).is_judged
    assert replace(facts, faults=(replace(broken, file="other"),)).is_judged
    loha = replace(facts, config=config_file({"peft_type": "LOHA"}, None))
    assert (loha.is_judged, loha.contradicts_method) == (False, True)
    assert not facts.contradicts_method
    assert not with_tensors(
        loha, TensorFacts("base_model.model.head.weight", "F32", (1,), None)
    ).contradicts_method
    assert configured(saved(["q"]), use_bdlora=True).other_method == "LoRA with use_bdlora"
    assert facts.misnamed == ()
    twice = saved(["base_model.model.q"])
    assert len(configured(twice).misnamed) == 2
    head = with_tensors(facts, TensorFacts("base_model.model.model.score.weight", "F32", (2, 2), None))
    assert [one.name for one in head.plain] == ["base_model.model.model.score.weight"]
    assert head.holds("score")
    assert not head.holds("core")
    assert len(head.lora) == 2
