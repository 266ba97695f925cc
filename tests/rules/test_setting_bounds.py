"""Rules on a configuration, each bound on both sides and each condition alone, on facts made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from peft import LoraConfig

from pytest_lora import Expect
from pytest_lora.facts.base import FusedParameter, TaskHead
from pytest_lora.facts.config import ConfigFacts, LayerFacts, PatternKey, Refusal, Repairs
from tests.rules.made import config, layer, module, target
from tests.rules.saying import says, told

Q0, Q1, V0 = layer("layers.0.q"), layer("layers.1.q"), layer("layers.0.v")


def scaled(scaling: float, rank: int = 8, **changes: Any) -> LayerFacts:
    root = rank**0.5 if changes.get("use_rslora") else rank
    return layer(rank=rank, alpha=scaling * root, scaling=scaling, **changes)


@pytest.mark.parametrize(
    ("one", "expect", "words"),
    [
        (scaled(32.0), {}, []),
        (scaled(32.1), {}, ["warning: the scaling is 256.8/8 = 32.1"]),
        (scaled(32.1), {}, ["warning: set lora_alpha=16, which gives a scaling of 2"]),
        (scaled(4.1), {"max_scaling": 4.0}, ["warning: a scaling of at most 4"]),
        (
            scaled(9.0, 4, use_rslora=True),
            {"max_scaling": 8.0, "max_scaling_rslora": 2.0},
            ["warning: a scaling of at most 4"],
        ),
        (scaled(9.0, 4, use_rslora=True), {"max_scaling": 8.0, "max_scaling_rslora": 9.0}, []),
        (
            scaled(9.0, 4, use_rslora=True),
            {"max_scaling": 8.0, "max_scaling_rslora": 8.9},
            ["warning: keep alpha near 16"],
        ),
        (
            scaled(9.0, 16, use_rslora=True),
            {"max_scaling": 8.0, "max_scaling_rslora": 5.0},
            ["warning: lora_alpha=16"],
        ),
        (
            scaled(1.9, 4, use_rslora=True),
            {"max_scaling": 1.8, "max_scaling_rslora": 5.0},
            ["warning: at most 1.8"],
        ),
        (scaled(2.0, 4, use_rslora=True), {"max_scaling": 1.8, "max_scaling_rslora": 5.0}, []),
        (scaled(99.0, 1, use_rslora=True), {}, ["warning: which gives a scaling of 2"]),
        (scaled(99.0, 2, use_rslora=True), {}, ["warning: keep alpha near 16 under rsLoRA"]),
    ],
)
def test_a_large_scaling(one: LayerFacts, expect: dict[str, Any], words: list[str]) -> None:
    facts = config(one, use_rslora=one.use_rslora, r=one.rank)
    says("alpha_blows_up_the_adapter", facts, *words, expect=Expect(**expect))


@pytest.mark.parametrize(
    ("one", "expect", "words"),
    [
        (scaled(0.5), {"low_scaling": 0.5}, []),
        (scaled(0.49), {"low_scaling": 0.5, "min_scaling": 0.1}, ["info: a scaling of at least 0.5"]),
        (scaled(0.1), {"low_scaling": 0.5, "min_scaling": 0.1}, ["info: a scaling of at least 0.5"]),
        (scaled(0.09), {"low_scaling": 0.5, "min_scaling": 0.1}, ["warning: a scaling of at least 0.1"]),
        (scaled(0.0), {"low_scaling": 0.5}, []),
        (scaled(8 / 128, 128), {"low_scaling": 0.5, "min_scaling": 0.01}, ["warning: 8 is PEFT's default"]),
        (scaled(8 / 127, 127), {"low_scaling": 0.5, "min_scaling": 0.01}, ["info: scale alpha with r:"]),
        (scaled(7 / 128, 128), {"low_scaling": 0.5, "min_scaling": 0.01}, ["info: r=128 with alpha=7"]),
        (scaled(0.1, 4, use_rslora=True), {"low_scaling": 0.5}, ["info: with the root of r under rsLoRA"]),
    ],
)
def test_a_small_scaling(one: LayerFacts, expect: dict[str, Any], words: list[str]) -> None:
    facts = config(one, use_rslora=one.use_rslora, r=one.rank)
    says("alpha_damps_the_adapter", facts, *words, expect=Expect(**expect))


def test_an_alpha_of_nothing() -> None:
    facts = config(layer(alpha=0.0), layer(alpha=-1.0), layer(alpha=0.5))
    says("alpha_is_not_positive", facts, "error: alpha is -1", "error: alpha is 0, so that"[:16])
    says("alpha_is_not_positive", config(layer(alpha=1e-9)))


@pytest.mark.parametrize(
    ("scaling", "ratio", "is_told"),
    [
        (2.0, 2.0, False),
        (2.0 * (1 + 9e-7), 2.0, False),
        (2.0 * (1 + 2e-6), 2.0, True),
        (200.0 * (1 + 9e-7), 200.0, False),
        (0.001 * (1 + 9e-7), 0.001, False),
        (0.001 * (1 + 2e-6), 0.001, True),
        (0.001 / (1 + 2e-6), 0.001, True),
        (2.0, None, False),
    ],
)
def test_a_scaling_beside_the_one_that_is_meant(scaling: float, ratio: float | None, is_told: bool) -> None:
    expect = Expect(alpha_ratio=ratio)
    facts = config(scaled(scaling))
    said = [f"error: a scaling of {ratio:g}"] if is_told else []
    says("scaling_differs_from_expected", facts, *said, expect=expect)


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        ({}, "set lora_alpha=24"),
        ({"use_rslora": True, "r": 16}, "set lora_alpha=12"),
        ({"rank_pattern": {"v": 4}}, "set lora_alpha=24, alpha_pattern={'v': 12}"),
        ({"alpha_pattern": {"v": 4}}, "set lora_alpha=24, alpha_pattern={}"),
        (
            {"use_rslora": True, "r": 16, "rank_pattern": {"v": 4}},
            "set lora_alpha=12, alpha_pattern={'v': 6}",
        ),
    ],
)
def test_the_alpha_of_a_scaling(fields: dict[str, Any], fix: str) -> None:
    (found,) = told("scaling_differs_from_expected", config(Q0, **fields), Expect(alpha_ratio=3.0))
    assert found.fix == fix


KEYED = PatternKey("alpha_pattern", "v", 64, ("layers.0.v",), None, ())


@pytest.mark.parametrize(
    ("layers", "patterns", "words"),
    [
        ((Q0, layer("layers.0.v", alpha=160)), (KEYED,), ["warning: v has 20, a factor of 10"]),
        ((Q0, layer("layers.0.v", alpha=128)), (KEYED,), []),
        ((Q0, layer("layers.0.v", alpha=160)), (), []),
        ((Q0, layer("layers.0.v", alpha=0)), (KEYED,), []),
        ((layer(alpha=0),), (KEYED,), []),
    ],
)
def test_a_spread_of_scalings(layers: Any, patterns: Any, words: list[str]) -> None:
    facts = config(*layers, known={"patterns": patterns}, alpha_pattern={"v": 64})
    found = told("scaling_differs_between_modules", facts, Expect(max_scaling_spread=8.0))
    assert len(found) == len(words)
    for one in found:  # the module that a key decides is the odd one
        assert one.severity == "warning"
        assert one.where == "layers.0.v"
        assert one.observed == "r=8 with alpha=160 gives a scaling of 20; q has 2, a factor of 10"
        assert one.fix == "let alpha follow the rank: alpha_pattern={'v': 16}"


def test_the_odd_one_of_two_scalings() -> None:
    low = KEYED.__class__("rank_pattern", "v", 64, ("layers.0.v",), None, ())
    facts = config(
        Q0, layer("layers.0.v", rank=128, alpha=16), known={"patterns": (low,)}, rank_pattern={"v": 128}
    )
    (found,) = told("scaling_differs_between_modules", facts)
    assert (found.where, found.fix) == ("layers.0.v", "let alpha follow the rank: alpha_pattern={'v': 256}")
    none = config(
        Q0,
        layer("layers.0.v", rank=128),
        known={"patterns": (low.__class__("rank_pattern", "x", 1, (), None, ()),)},
    )
    (found,) = told("scaling_differs_between_modules", none)
    assert (found.where, found.fix) == ("layers.0.q", "let alpha follow the rank: alpha_pattern={'q': 1}")
    rooted = config(layer(rank=4, alpha=1, use_rslora=True), V0, known={"patterns": (low,)})
    (found,) = told("scaling_differs_between_modules", rooted, Expect(max_scaling_spread=1.5))
    assert found.fix == "let alpha follow the rank: alpha_pattern={'v': 4}"


@pytest.mark.parametrize(
    ("layers", "fields", "words"),
    [
        (
            (layer(rank=33, in_features=64),),
            {},
            ["info: r=33 on a 64 x 64 matrix: the adapter holds 4,224 numbers"],
        ),
        ((layer(rank=32),), {}, []),
        ((layer(rank=65),), {}, ["warning: more than the matrix itself with 4,096"]),
        ((layer(rank=64),), {}, ["info: more than the matrix"]),
        ((layer(rank=65),), {}, ["warning: set r=8, lora_alpha=16"]),
        ((layer(rank=33, in_features=32, kernel=2),), {}, ["info: r=33 on a 64 x 64 matrix"]),
        (
            (layer(rank=33), layer("layers.0.v", in_features=640)),
            {},
            ["info: set rank_pattern={'q': 8}, alpha_pattern={'q': 3"],
        ),
        (
            (layer(rank=33),),
            {"rank_pattern": {"v": 2}},
            ["info: set rank_pattern={'v': 2, 'q': 8}, alpha_pattern="],
        ),
        (
            (layer(rank=33),),
            {"alpha_pattern": {"v": 2}},
            ["info: set rank_pattern={'q': 8}, alpha_pattern={'v': 2, 'q': 3"],
        ),
        (
            (layer(rank=16, alpha=16, in_features=16, out_features=16, use_rslora=True), V0),
            {},
            ["info: rank_pattern={'q': 2}, alpha_pattern={'q': 5.6568"],
        ),
        ((layer(rank=2, in_features=2, out_features=2),), {}, ["info: set r=1"]),
        (
            (layer(rank=9, in_features=1, out_features=64),),
            {},
            ["warning: adapt larger modules: rank 1 is too large"],
        ),
        ((layer(rank=33), layer(rank=33, in_features=32)), {}, ["warning: set r=4"]),
        (
            (layer("a.q", rank=33), layer("b.q", rank=33, in_features=32), V0),
            {},
            ["warning: rank_pattern={'q': 4}"],
        ),
        (
            (
                layer(rank=9, in_features=8, out_features=8),
                layer("v", rank=9, in_features=72, out_features=72),
            ),
            {},
            ["warning: r=9 on a 8 x 8"],
        ),
        (
            (
                layer(rank=9, in_features=8, out_features=8),
                layer("v", rank=9, in_features=73, out_features=72),
            ),
            {},
            ["info: r=9 on a 8 x 8"],
        ),
    ],
)
def test_a_rank_beside_its_matrix(layers: Any, fields: dict[str, Any], words: list[str]) -> None:
    says("rank_exceeds_the_matrix", config(*layers, **fields), *words)


@pytest.mark.parametrize(
    ("dropout", "expect", "words"),
    [
        (0.5, {"max_dropout": 0.5}, []),
        (0.51, {"max_dropout": 0.5}, ["warning: set lora_dropout=0.49, if that share"]),
        (0.51, {"max_dropout": 0.5, "purpose": "inference"}, []),
        (1.0, {"max_dropout": 0.5}, ["error: set lora_dropout=0.05"]),
        (0.0, {}, []),
        (-0.1, {}, ["error: lora_dropout=-0.1 is no probability"]),
    ],
)
def test_a_dropout(dropout: float, expect: dict[str, Any], words: list[str]) -> None:
    facts = config(Q0, lora_dropout=dropout)
    found = told("dropout_starves_the_adapter", facts, Expect(**expect))
    assert [one.severity for one in found if dropout >= 0] == [
        text.partition(":")[0] for text in words if dropout >= 0
    ]
    assert all(text.partition(": ")[2] in str(one) for one, text in zip(found, words, strict=True)), found


@pytest.mark.parametrize(
    ("bias", "has_biases", "severity"),
    [("all", True, "warning"), ("lora_only", True, "info"), ("none", True, None), ("all", False, None)],
)
def test_biases(bias: str, has_biases: bool, severity: str | None) -> None:
    facts = config(Q0, base={"has_biases": has_biases}, bias=bias)
    assert [one.severity for one in told("biases_of_the_base_are_trained", facts)] == (
        [severity] if severity else []
    )


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("frozen_by_inference_mode", {"inference_mode": True}),
        ("init_is_random", {"init_lora_weights": False}),
    ],
)
def test_what_does_not_train(rule: str, fields: dict[str, Any]) -> None:
    assert len(told(rule, config(Q0, **fields))) == 1
    assert not told(rule, config(Q0))
    assert not told(rule, config(Q0, known={"live": True}, **fields))
    assert not told(rule, config(Q0, **fields), Expect(purpose="inference"))


@pytest.mark.parametrize(
    ("init", "rank", "kind", "live", "is_told"),
    [
        ("orthogonal", 7, "Linear", False, True),
        ("Orthogonal", 8, "Linear", False, False),
        ("orthogonal", 7, "Embedding", False, False),
        ("orthogonal", 7, "Linear", True, False),
        (True, 7, "Linear", False, False),
    ],
)
def test_an_odd_rank(init: Any, rank: int, kind: str, live: bool, is_told: bool) -> None:
    facts = config(layer(rank=rank, kind=kind), known={"live": live}, init_lora_weights=init, r=rank)
    says("rank_is_odd_for_orthogonal_init", facts, *(["error: set r=8, lora_alpha=18.28"] if is_told else []))


QUANTIZED = {"modules": (module("layers.0.q", "Linear4bit", "4bit"), module("layers.1.q"))}


@pytest.mark.parametrize(
    ("init", "layers", "live", "words"),
    [
        ("pissa", (Q0,), False, ["error: weights that are already quantized to 4bit"]),
        ("pissa", (Q1,), False, []),
        ("pissa", (Q0,), True, []),
        ("gaussian", (Q0,), False, []),
        ("olora", (Q0,), False, []),
        ("olora", (layer(kind="Parameter"),), False, ["error: on fused parameters"]),
        ("gaussian", (layer(kind="Parameter"),), False, []),
    ],
)
def test_an_init_on_weights(init: str, layers: Any, live: bool, words: list[str]) -> None:
    facts = config(*layers, base=QUANTIZED, known={"live": live}, init_lora_weights=init)
    says("init_does_not_fit_the_weights", facts, *words)


@pytest.mark.parametrize(
    ("will_merge", "layers", "is_told"), [(True, (Q0,), True), (True, (Q1,), False), (False, (Q0,), False)]
)
def test_a_merge_into_quantized_weights(will_merge: bool, layers: Any, is_told: bool) -> None:
    facts = config(*layers, base=QUANTIZED)
    found = told("merge_into_quantized_weights", facts, Expect(will_merge=will_merge))
    assert [one.where for one in found] == (["layers.0.q"] if is_told else [])


@pytest.mark.parametrize(
    ("message", "will_merge", "fix"),
    [
        ("no merge of groups", True, "take the convolutions in groups out"),
        ("there is no bias", True, "set lora_bias=False"),
        ("it is odd", True, "load the adapter beside the base"),
        ("it is odd", False, None),
        (None, True, None),
    ],
)
def test_a_merge_that_peft_refuses(message: str | None, will_merge: bool, fix: str | None) -> None:
    refusal = None if message is None else Refusal("ValueError", message)
    found = told(
        "merge_is_impossible", config(Q0, known={"merge_refusal": refusal}), Expect(will_merge=will_merge)
    )
    assert [one.fix.startswith(fix or "") for one in found] == ([True] if fix else [])


@pytest.mark.parametrize(
    ("tokens", "task_type", "size", "words"),
    [
        ([1, 99], "CAUSAL_LM", 100, []),
        ([1, 100], "CAUSAL_LM", 100, ["error: the vocabulary of 100 tokens does not have [100]"]),
        ([0, -1], "CAUSAL_LM", 100, ["error: does not have [-1]"]),
        ([1, 100], "CAUSAL_LM", None, []),
        ([1], None, 100, ["error: task_type=None: PEFT looks for them"]),
        ([], "CAUSAL_LM", 100, ["error: there are none"]),
        (list(range(100, 107)), "CAUSAL_LM", 100, ["error: does not have [100, 101, 102, 103, 104];"]),
        (None, None, 100, []),
    ],
)
def test_invocation_tokens(tokens: Any, task_type: Any, size: int | None, words: list[str]) -> None:
    facts = config(Q0, base={"vocab_size": size}, task_type=task_type)
    known = replace(facts.settings, alora_invocation_tokens=None if tokens is None else tuple(tokens))
    found = told("invocation_never_comes", replace(facts, settings=known))
    assert len(found) == len(words)
    assert all(text.partition(": ")[2] in one.observed for one, text in zip(found, words, strict=True)), found


@pytest.mark.parametrize(
    ("layers", "indices", "words"),
    [
        ([0, 2], (0, 1), ["error: [2] of [0, 2] do not exist"]),
        ([0, 2], (0, 1), ["error: numbers from 0 to 1: the base has 2 blocks"]),
        ([0, 2], (0, 1), ["error: drop [2]: layers_to_transform=[0]"]),
        ([0, 1], (0, 1), []),
        ([0, 2], (), []),
    ],
)
def test_layers_that_do_not_exist(layers: Any, indices: Any, words: list[str]) -> None:
    facts = config(Q0, base={"layer_indices": indices}, layers_to_transform=layers)
    found = told("layer_does_not_exist", facts)
    assert len(found) == len(words)
    assert all(text.partition(": ")[2] in str(one) for one, text in zip(found, words, strict=True)), found


def carried(refusal: Refusal | None, live: bool = False, carries: bool = True) -> ConfigFacts:
    return config(Q0, base={"carries_adapter": carries}, known={"refusal": refusal, "live": live})


@pytest.mark.parametrize(
    ("facts", "ending"),
    [
        (carried(None), "call add_adapter instead of get_peft_model"),
        (carried(Refusal("ValueError", "no")), "take the first adapter off: base = base.unload()"),
        (carried(Refusal("", "no")), "call add_adapter instead of get_peft_model"),
        (carried(None, live=True), None),
        (carried(None, carries=False), None),
    ],
)
def test_a_base_with_an_adapter(facts: ConfigFacts, ending: str | None) -> None:
    found = told("base_already_carries_an_adapter", facts)
    assert [one.fix.endswith(ending or "") for one in found] == ([True] if ending else [])


# ------------------------------------------------------------------ heads, tokens, what is saved in full


def headed(
    fresh: bool | None, *layers: LayerFacts, base: dict[str, Any] | None = None, **more: Any
) -> ConfigFacts:
    return config(
        *layers, base={"heads": (TaskHead("score", fresh),), "task_type": "SEQ_CLS", **(base or {})}, **more
    )


@pytest.mark.parametrize(
    ("facts", "expect", "words"),
    [
        (headed(True, Q0), {}, ["warning: it stays frozen"]),
        (headed(None, Q0), {}, ["info: it stays frozen"]),
        (headed(False, Q0), {}, []),
        (headed(True, Q0, known={"saved_modules": ("score",)}), {}, []),
        (headed(True, layer("score")), {}, ["warning: is a LoRA target, but its own random weight"]),
        (headed(True, layer("score.dense")), {}, ["warning: is a LoRA target"]),
        (headed(True, layer("scores")), {}, ["warning: it stays frozen"]),
        (headed(True, Q0), {"pretrained_head": True}, []),
        (headed(True, Q0), {"purpose": "inference"}, []),
        (headed(True, Q0, known={"refusal": Refusal("ValueError", "no")}), {}, []),
        (
            headed(True, Q0),
            {},
            ["warning: set modules_to_save=['score'], or task_type='SEQ_CLS', which adds it"],
        ),
        (
            headed(True, Q0, target_modules=["q", "score"]),
            {},
            ["warning: modules_to_save=['score'], target_modules=['q']"],
        ),
        (
            headed(True, Q0, target_modules=["score"]),
            {},
            ["warning: modules_to_save=['score'], or task_type"],
        ),
    ],
)
def test_a_head_that_is_new(facts: ConfigFacts, expect: dict[str, Any], words: list[str]) -> None:
    says("new_head_is_not_trained", facts, *words, expect=Expect(**expect))


def test_a_head_whose_task_type_is_set() -> None:
    (found,) = told("new_head_is_not_trained", headed(True, Q0, task_type="SEQ_CLS"))
    assert found.fix == "set modules_to_save=['score']"
    (found,) = told("new_head_is_not_trained", headed(True, Q0))
    assert found.fix == "set modules_to_save=['score'], or task_type='SEQ_CLS', which adds it"
    # PEFT looks for "classifier" and "score" only.
    projector = {"heads": (TaskHead("projector", True),)}
    (found,) = told("new_head_is_not_trained", headed(True, Q0, base=projector, modules_to_save=["x", "x"]))
    assert found.fix == "set modules_to_save=['x', 'projector']"
    (found,) = told("new_head_is_not_trained", headed(True, Q0, target_modules=["q", "score"]))
    assert "which adds it" not in found.fix


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, 99], []),
        ([99, 100], ["error: call base.resize_token_embeddings(101)"]),
        ([-1, 0], ["error: drop [-1]: "]),
        ([-1, 100], ["error: drop [-1, 100]: "]),
        ({"embed": [100]}, ["error: trainable_token_indices['embed'] on"]),
        ({"embed": [5, -1], "head": [7]}, ["error: trainable_token_indices={'head': [7], 'embed': [5]}"]),
    ],
)
def test_rows_that_an_embedding_of_a_hundred_has(rows: Any, words: list[str]) -> None:
    says("token_index_does_not_exist", config(Q0, trainable_token_indices=rows), *words)
    unknown = config(Q0, base={"vocab_size": None}, trainable_token_indices=rows)
    says("token_index_does_not_exist", unknown)


ROWS_OF_EMBED = {"token_modules": ("embed",)}


@pytest.mark.parametrize(
    ("known", "base", "fields", "wheres"),
    [
        ({}, {}, {}, ["error embed", "warning lm_head"]),
        ({}, {"tied": (("embed", "lm_head"),)}, {}, ["error embed"]),
        ({}, {"output_embeddings": None}, {}, ["error embed"]),
        ({"saved_modules": ("embed",)}, {}, {}, ["warning lm_head"]),
        ({"stored": ("embed",)}, {}, {}, ["warning lm_head"]),
        (ROWS_OF_EMBED, {}, {"trainable_token_indices": [97, 98, 99]}, ["warning lm_head"]),
        (ROWS_OF_EMBED, {}, {"trainable_token_indices": [96, 97, 98]}, ["error embed", "warning lm_head"]),
    ],
)
def test_rows_that_are_new(known: Any, base: Any, fields: Any, wheres: list[str]) -> None:
    facts = config(Q0, base=base, known=known, **fields)
    found = told("new_tokens_are_not_trained", facts, Expect(new_tokens=3))
    assert [f"{one.severity} {one.where}" for one in found] == wheres
    assert not told("new_tokens_are_not_trained", facts)
    missing = 1 if known == ROWS_OF_EMBED else 3
    assert all(one.observed.startswith(f"{missing if one.where == 'embed' else 3} of 3") for one in found)
    adapted = config(layer("embed"), layer("lm_head"))
    assert not told("new_tokens_are_not_trained", adapted, Expect(new_tokens=3))


def test_a_module_to_save_that_is_misspelt_is_the_nearest_and_a_head_the_one_that_is_there() -> None:
    for lost, meant in (("embd", "embed"), ("lm_head", "score"), ("classifier", "score"), ("zz", "score")):
        names = (target(lost, field="modules_to_save"),)
        facts = headed(
            True, base={"module_names": ("embed", "score")}, known={"names": names}, modules_to_save=[lost]
        )
        (found,) = told("saved_module_matches_nothing", facts)
        assert found.fix.startswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("names", "fields", "words"),
    [
        (
            (target("scor", field="modules_to_save"),),
            {"modules_to_save": ["scor"]},
            "did you mean 'score'? modules_to_save=['score']",
        ),
        (
            (target("zzz", field="modules_to_save"),),
            {"modules_to_save": ["zzz", "x"]},
            "did you mean 'score'? modules_to_save=['x', 'score']; else drop it: modules_to_save=['x']",
        ),
        (
            tuple(target(n, field="modules_to_save") for n in "abc"),
            {"modules_to_save": "abc"},
            "put the name into a list: modules_to_save=['abc']",
        ),
        (
            tuple(target(n, field="modules_to_save") for n in "ab"),
            {"modules_to_save": ["a", "b"]},
            "did you mean 'score'?",
        ),
        (
            tuple(target(n, field="modules_to_save") for n in ("a", "b", "cc")),
            {"modules_to_save": ["a", "b", "cc"]},
            "did you mean",
        ),
    ],
)
def test_a_module_to_save_that_is_not_there(names: Any, fields: Any, words: str) -> None:
    facts = headed(True, Q0, base={"module_names": ("score", "q")}, known={"names": names}, **fields)
    (found,) = told("saved_module_matches_nothing", facts)
    assert found.fix.startswith(words), found.fix
    bare = config(Q0, base={"module_names": (), "output_embeddings": None}, known={"names": names}, **fields)
    (found,) = told("saved_module_matches_nothing", bare)
    assert "did you mean" not in found.fix
    output = config(Q0, base={"module_names": ()}, known={"names": names}, **fields)
    (found,) = told("saved_module_matches_nothing", output)
    assert ("did you mean 'lm_head'" in found.fix) is not ("into a list" in found.fix)


@pytest.mark.parametrize(
    ("fields", "quantization", "live", "wheres"),
    [
        ({"loftq_config": {"x": 1}}, None, False, ["loftq_config"]),
        ({"loftq_config": {"x": 1}, "init_lora_weights": "loftq"}, None, False, []),
        ({"loftq_config": {"x": 1}}, None, True, []),
        ({"use_qalora": True}, None, False, ["use_qalora"]),
        ({"use_qalora": True}, "4bit", False, ["use_qalora"]),
        ({"use_qalora": True}, "gptq or awq", False, []),
        ({}, None, False, []),
    ],
)
def test_settings_without_effect(
    fields: Any, quantization: str | None, live: bool, wheres: list[str]
) -> None:
    facts = config(Q0, base={"modules": (module("q", quantization=quantization),)}, known={"live": live})
    known = replace(facts.settings, **{n: v if n == "init_lora_weights" else True for n, v in fields.items()})
    assert [one.where for one in told("setting_has_no_effect", replace(facts, settings=known))] == wheres


@pytest.mark.parametrize(
    ("expect", "base", "trained", "words"),
    [
        ({"param_ratio": (0.1, 0.5)}, 9, 1, []),
        ({"param_ratio": (0.1, 0.5)}, 5, 5, []),
        ({"param_ratio": (0.1, 0.5)}, 4, 5, ["error: lower r"]),
        ({"param_ratio": (0.1, 0.5)}, 10, 1, ["error: raise r"]),
        ({"large_base": 1000, "advised_percent": (10, 50)}, 1000, 10, ["info: raise r"]),
        ({"large_base": 1001, "advised_percent": (10, 50)}, 1000, 10, []),
        ({"large_base": 1000, "advised_percent": (10, 50)}, 1000, 200, []),
        ({"param_ratio": (0.1, 0.5)}, 4, 0, ["error: raise r"]),
    ],
)
def test_a_share_of_parameters(expect: Any, base: int, trained: int, words: list[str]) -> None:
    facts = config(layer(parameters=trained), base={"parameters": base})
    found = told("parameter_share_is_outside_the_band", facts, Expect(**expect))
    assert [f"{one.severity}: {one.fix[: one.fix.index(' r') + 2]}" for one in found] == words
    assert not told(
        "parameter_share_is_outside_the_band", config(base={"parameters": base}), Expect(**expect)
    )


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        ({}, "raise r: r=15, lora_alpha=30, or target more modules"),
        ({"rank_pattern": {"v": 4}}, "raise r, or target more modules"),
        ({"use_dora": True}, "raise r, or target more modules"),
    ],
)
def test_the_rank_of_a_share(fields: dict[str, Any], fix: str) -> None:
    expect = Expect(param_ratio=(0.2, 0.3))
    facts = config(layer(parameters=80), base={"parameters": 600}, **fields)
    (found,) = told("parameter_share_is_outside_the_band", facts, expect)
    assert found.fix == fix
    assert found.observed == "80 trained parameters, 11.7647% of 680"
    (found,) = told(
        "parameter_share_is_outside_the_band", config(layer(parameters=80), base={"parameters": 50}), expect
    )
    assert found.fix == "lower r: r=2, lora_alpha=4, or target fewer modules"
    (found,) = told(
        "parameter_share_is_outside_the_band", config(layer(parameters=8), base={"parameters": 10**6}), expect
    )
    assert found.fix == "raise r, or target more modules"


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("layers", "fields", "words"),
    [
        (
            (Q0, layer("vision.q")),
            {},
            ["match 1 of 2 modules outside the scope 'layers'", "(.*\\\\.)?layers\\\\.(.*\\\\.)?(q)"],
        ),
        ((Q0,), {}, []),
        ((layer("vision.q"),), {}, ["1 of 1", "name modules inside layers in target_modules"]),
        (
            (Q0, layer("vision.q")),
            {"layers_to_transform": [0]},
            ["1 of 2", "leave out what is outside: exclude_modules='(?!"],
        ),
        (
            (Q0, layer("vision.q")),
            {"target_modules": ".*q"},
            ["1 of 2", "leave out what is outside: exclude_modules='(?!"],
        ),
        (
            (Q0, layer("vision.q")),
            {"target_modules": ".*q", "exclude_modules": ["x"]},
            ["1 of 2", "exclude what is outside layers, too"],
        ),
    ],
)
def test_targets_outside_of_the_scope(layers: Any, fields: Any, words: list[str]) -> None:
    found = told("target_is_out_of_scope", config(*layers, **fields), Expect(scope="layers"))
    assert len(found) == bool(words)
    assert all(text in f"{one.observed} {one.fix}" for one in found for text in words), found
    assert not told("target_is_out_of_scope", config(*layers, **fields))


def saved_too(*saves: str, live: bool = False, tokens: tuple[str, ...] = (), **fields: Any) -> ConfigFacts:
    names = (target("q", "layers.0.q", "layers.1.q"), target("score", "score"), target("none"))
    known = {"names": names, "saved_modules": saves, "live": live, "token_modules": tokens}
    heads = {"heads": (TaskHead("score", True),)}
    return config(Q0, base=heads, known=known, **{"target_modules": ["q", "score", "none"], **fields})


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (saved_too("layers.0.q", "layers.1.q"), ["warning: ['q'] are both LoRA targets"]),
        (saved_too("layers.0.q"), []),
        (
            saved_too(modules_to_save=["q"]),
            ["warning: set target_modules=['none', 'score'], or for a LoRA set modules_to_save=None"],
        ),
        (saved_too("score"), ["warning: ['score'] are both"]),
        (saved_too("score", live=True), []),
        (saved_too("layers.0.q", "layers.1.q", live=True), ["warning: ['q'] are both"]),
        (saved_too("score", target_modules=["score"]), ["warning: make a configuration that names it once"]),
        (
            saved_too(modules_to_save=["score"], target_modules=["score"]),
            ["warning: for a LoRA set modules_to_save=None"],
        ),
        (saved_too("layers.0.q", "layers.1.q", target_modules=".*q"), []),
        (
            saved_too("embed", tokens=("embed",)),
            ["error: ['embed'] are trained in full by modules_to_save and row by row"],
        ),
        (saved_too("x", tokens=("embed",)), []),
        (
            saved_too("embed", tokens=("embed",), modules_to_save=["embed", "x"]),
            ["error: with modules_to_save=['x'], or"],
        ),
    ],
)
def test_what_is_adapted_and_saved(facts: ConfigFacts, words: list[str]) -> None:
    says("target_is_also_saved", facts, *words)


EXPERTS = (
    FusedParameter("layers.0.experts.gate_up_proj", 300),
    FusedParameter("layers.0.experts.down_proj", 100),
)


def fused(target_modules: Any, *layers: LayerFacts, parameters: int = 1000, **fields: Any) -> ConfigFacts:
    base = {"fused": EXPERTS, "parameters": parameters}
    return config(*layers, base=base, target_modules=target_modules, **fields)


UP, DOWN = layer("layers.0.shared.up_proj"), layer("layers.0.shared.down_proj")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (fused("all-linear", Q0, parameters=799), ["info: adapts 1 modules; 50% of the base are fused"]),
        (fused("all-linear", Q0, parameters=800), []),
        (fused("all-linear", layer("layers.0.experts.gate_up_proj"), parameters=300), []),
        (fused(["q"], Q0), []),
        (fused(["up_proj"], UP), ["warning: ['up_proj'] match layers.0.shared.up_proj and its like alone"]),
        (fused(["up_proj"], UP), ["warning: the routed experts, 30% of the base"]),
        (fused(["up_proj"], UP), ["warning: target_parameters=['experts.gate_up_proj']; if"]),
        (fused(["up_proj"], UP, lora_dropout=0.1), ["warning: lora_dropout=0; if"]),
        (fused(["down_proj", "up_proj"], UP, DOWN), ["warning: the routed experts, 40% of the base"]),
        (fused(["up_proj"], DOWN), []),
        (fused([".*up_proj"], UP), []),
        (fused("up_proj", UP), []),
        (fused(["proj"], layer("x.proj")), []),
        (fused(["down_proj"], DOWN, layer("layers.0.experts.down_proj")), []),
        (fused("all-linear", Q0, parameters=500, lora_dropout=0.1), ["info: lora_dropout=0"]),
        (
            fused("all-linear", Q0, parameters=500),
            ["info: experts too, set target_parameters=['experts.down_proj', 'experts.gate_up_proj']"],
        ),
    ],
)
def test_fused_experts(facts: ConfigFacts, words: list[str]) -> None:
    says("fused_experts_are_left_out", facts, *words)


OUT = layer("attn.out_proj", kind="NonDynamicallyQuantizableLinear")


@pytest.mark.parametrize(
    ("layers", "targets", "words"),
    [
        ((OUT,), ["out_proj"], ["error: 1 of 1 adapters are on out_proj"]),
        ((OUT, Q0), ["out_proj", "q"], ["warning: along: target_modules=['q', 'attn']"]),
        ((OUT, Q0), ".*", ["warning: along: target_modules=['q', 'attn']"]),
        ((OUT, layer("attn")), ["out_proj", "attn"], []),
        ((Q0,), ["q"], []),
    ],
)
def test_an_adapter_that_is_never_called(layers: Any, targets: Any, words: list[str]) -> None:
    says("adapter_is_bypassed", config(*layers, target_modules=targets), *words)


def excluded(
    name: str, *modules: str, similar: tuple[str, ...] = (), targets: Any = ("q",), layers: Any = (Q0,)
) -> ConfigFacts:
    base = {"modules": tuple(module(n) for n in ("layers.0.q", "layers.0.v"))}
    names = (target("q", "layers.0.q"), target(name, *modules, similar=similar, field="exclude_modules"))
    written = targets if isinstance(targets, str) else list(targets)
    return config(
        *layers, base=base, known={"names": names}, target_modules=written, exclude_modules=[name, "x"]
    )


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (excluded("v"), ["warning: 'v' excludes nothing: no module of the base matches it"]),
        (
            excluded("v"),
            ["warning: name adapted modules, or drop it, which changes nothing: exclude_modules=['x']"],
        ),
        (excluded("v", "layers.0.v"), []),
        (excluded("layers", "layers.0"), ["warning: excludes nothing: 1 adapted modules are inside it"]),
        (excluded("layers", "layers.0", "layers.9.q"), []),
        (excluded("layers", "layers.0", "layers.0.v"), ["warning: 1 adapted modules are inside it"]),
        (excluded("layers", "layers.0", "layers.0.v", targets="all-linear"), []),
        (excluded("v", similar=("q",)), ["warning: did you mean 'q'? exclude_modules=['x', 'q']; else drop"]),
        (excluded("v", similar=("k",)), ["warning: name adapted modules, or drop it"]),
        (
            excluded("layers", "layers.0", layers=(Q0, V0, layer("a.k"))),
            ["warning: themselves: exclude_modules=['x', 'q', 'v']"],
        ),
        (
            excluded("layers", "layers.0", layers=(Q0, layer("a.q"), V0)),
            ["warning: name adapted modules, or drop it"],
        ),
    ],
)
def test_an_exclusion(facts: ConfigFacts, words: list[str]) -> None:
    says("exclusion_excludes_nothing", facts, *words)


MEANT: list[tuple[dict[str, Any], tuple[LayerFacts, ...], list[str]]] = [
    ({}, (Q0,), []),
    ({"r": 4}, (Q0,), ["r is 8"]),
    ({"lora_alpha": 8}, (Q0,), ["lora_alpha is 16"]),
    ({"use_rslora": True}, (Q0,), ["use_rslora is False"]),
    ({"use_dora": True}, (Q0,), ["use_dora is False"]),
    ({"lora_dropout": 0.5}, (Q0,), ["lora_dropout is 0.0"]),
    ({"target_modules": ["q", "v"]}, (Q0,), ["target_modules is without an adapter"]),
    ({"target_modules": ["v"]}, (V0, Q0), ["target_modules is wider than meant: these modules are adapted"]),
    ({"target_modules": ["v"]}, (V0, layer("layers.0.q", kind="Parameter")), []),
    ({}, (Q0, layer("layers.0.q.out_proj"), layer("layers.0.q", kind="MultiheadAttention")), []),
    ({"r": 4, "rank_pattern": {"q": 8}}, (Q0,), []),
]


@pytest.mark.parametrize(("fields", "layers", "observed"), MEANT)
def test_another_configuration_than_is_meant(fields: Any, layers: Any, observed: list[str]) -> None:
    facts = config(*layers, base={"modules": (module("layers.0.q"), module("layers.0.v"))})
    meant = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["q"], **fields})
    assert [
        one.observed for one in told("differs_from_expected_config", facts, Expect(config=meant))
    ] == observed
    assert not told("differs_from_expected_config", facts)


def key(
    name: str,
    *decides: str,
    value: float = 4,
    shadowed_by: str | None = None,
    elsewhere: tuple[str, ...] = (),
    **asked: Any,
) -> PatternKey:
    return PatternKey("rank_pattern", name, value, decides, shadowed_by, elsewhere, **asked)


def patterned(*keys: PatternKey, targets: Any = ("q",), **base: Any) -> ConfigFacts:
    names = (target("q", "layers.0.q"), target("lost"))
    known = {"patterns": keys, "names": names}
    fields = {"rank_pattern": {one.key: int(one.value) for one in keys}}
    listed = {
        "modules": (module("layers.0.q"), module("layers.0.v")),
        "module_names": ("layers", "layers.0", "layers.0.q"),
    }
    return config(Q0, base={**listed, **base}, known=known, target_modules=list(targets), **fields)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (patterned(key("q", "layers.0.q")), []),
        (patterned(key("lost")), []),
        (patterned(key("v")), ["error: key 'v' (value 4) is ignored: it matches no module"]),
        (
            patterned(key("v")),
            ["error: write the end of an adapted module's name, or drop it: rank_pattern={}"],
        ),
        (
            patterned(key("^q", by_its_end=True)),
            ["error: write the end of the name: rank_pattern={'q': 4}; or drop it"],
        ),
        (patterned(key("(", is_expression=False)), ["error: it is no regular expression"]),
        (
            patterned(key("v", elsewhere=("layers.0.v",))),
            ["error: it matches layers.0.v, which are no LoRA targets"],
        ),
        (
            patterned(key("v", elsewhere=("layers.0.v",))),
            ["error: adapt it, too: target_modules=['q', 'v']; or drop it"],
        ),
        (patterned(key("w", elsewhere=("layers.0.w",))), ["error: drop it: rank_pattern={}"]),
        (patterned(key("layers")), ["error: it is the start of names"]),
        (patterned(key("layers")), ["error: write rank_pattern={'layers.*': 4}"]),
        (patterned(key("base_model.model.q")), ["error: write rank_pattern={'q': 4}"]),
        (
            patterned(key("q", "layers.0.q"), key("0.q", shadowed_by="q", own=("layers.0.q",))),
            ["error: 'q' means the same modules; drop it"],
        ),
        (
            patterned(key("q", "layers.0.q", "layers.1.q"), key("0.q", value=2, shadowed_by="q")),
            ["error: put it before 'q': rank_pattern={'0.q': 2, 'q': 4}; or"],
        ),
    ],
)
def test_keys_of_patterns(facts: ConfigFacts, words: list[str]) -> None:
    says("pattern_key_has_no_effect", facts, *words)


@pytest.mark.parametrize(
    ("fields", "message", "words"),
    [
        ({"r": 1}, "layers_pattern is set", "set layers_pattern=None"),
        ({"r": 1, "rank_pattern": {"q": 1}}, "layers_pattern is set", "set layers_pattern=None"),
        ({"rank_pattern": {"q": 0}}, "layers_pattern is set", "a rank is a whole number above 0"),
        (
            {"trainable_token_indices": {"embed": [1]}},
            "no words for this",
            "change what the message of PEFT names",
        ),
        ({"trainable_token_indices": [1]}, "no words for this", "change what the message of PEFT names"),
        (
            {"trainable_token_indices": {"wte": [1]}},
            "no words for this",
            "name the embedding as this base does",
        ),
    ],
)
def test_what_a_refusal_is_about(fields: dict[str, Any], message: str, words: str) -> None:
    facts = config(known={"refusal": Refusal("ValueError", message)}, **fields)
    says("peft_refuses_the_config", facts, f"error: {words}")


PARTS = ("layers.0", "layers.0.attn", "layers.0.attn.q", "layers.0.attn.k", "layers.0.norm", "embed")
LAYERS = (module("layers.0.attn.q"), module("layers.0.attn.k"), module("layers.0.norm", kind="LayerNorm"))
UNSUPPORTED = "Target module Norm(64) is not supported"
EMPTIED = "No modules were targeted"
ROWS_AND_LAYER = "trainable_token_indices cannot be used"


@pytest.mark.parametrize(
    ("message", "fields", "fix"),
    [
        (UNSUPPORTED, {"target_modules": ["attn"]}, "target_modules=['k', 'q']"),
        (UNSUPPORTED, {"target_modules": ["norm"]}, "target_modules='all-linear'"),
        (UNSUPPORTED, {"target_modules": ["norm", "embed"]}, "target_modules=['embed']"),
        (UNSUPPORTED, {"target_modules": ["q", "norm", "attn"]}, "target_modules=['k', 'q']"),
        (UNSUPPORTED, {"target_modules": ".*norm"}, "fits them alone, or target_modules='all-linear'"),
        (ROWS_AND_LAYER, {"target_modules": ["q", "embed"]}, "=None, or target_modules=['q']"),
        (ROWS_AND_LAYER, {"target_modules": ["embed"]}, "in one way: set trainable_token_indices=None"),
        (ROWS_AND_LAYER, {"target_modules": ".*embed"}, "in one way: set trainable_token_indices=None"),
        (EMPTIED, {"exclude_modules": ["q"], "modules_to_save": ["head"]}, ": exclude_modules=None"),
        (EMPTIED, {"modules_to_save": ["attn", "head"]}, ": modules_to_save=['head']"),
        ("give `target_modules`", {"target_modules": None}, "set target_modules='all-linear'"),
        ("groups=4 and rank 8", {"r": 8}, ": r=8"),
        ("groups=4 and rank 9", {"r": 9}, ": r=12"),
        ("", {"r": 0, "rank_pattern": {"q": 0, "v": 4}}, ": r=8, rank_pattern={'v': 4}"),
        ("", {"rank_pattern": {"q": -1, "v": 1}}, ": rank_pattern={'v': 1}"),
        ("instances of 'str'", {"rank_pattern": {"q": 4}}, "r=8, lora_alpha=16, rank_pattern={'q': 4}"),
        ("", {"trainable_token_indices": {"wte": [1], "embed": [2]}}, "={'embed': [1, 2]}, not 'wte'"),
        ("lora_dropout is odd", {}, "leave lora_dropout at its default"),
    ],
)
def test_what_peft_refuses_is_mended(message: str, fields: dict[str, Any], fix: str) -> None:
    base = {"module_names": PARTS, "modules": LAYERS}
    (found,) = told(
        "peft_refuses_the_config",
        config(base=base, known={"refusal": Refusal("ValueError", message)}, **fields),
    )
    assert found.fix.endswith(fix)
    assert not told("peft_refuses_the_config", config(base=base, **fields))


@pytest.mark.parametrize(
    ("field", "value", "mended", "fix"),
    [
        ("target_modules", "*q", ".*q", "target_modules='.*q'"),
        ("target_modules", "*q", None, "target_modules='all-linear'"),
        ("exclude_modules", "*q", None, "exclude_modules=None"),
        ("rank_pattern", {"*q": 4, "v": 2}, ".*q", "rank_pattern={'.*q': 4, 'v': 2}"),
        ("rank_pattern", {"*q": 4, "v": 2}, None, "rank_pattern={'v': 2}"),
    ],
)
def test_a_pattern_that_is_none_is_mended(field: str, value: Any, mended: str | None, fix: str) -> None:
    known = {"refusal": Refusal("error", "nothing to repeat"), "repairs": Repairs((field, "*q"), mended)}
    (found,) = told("peft_refuses_the_config", config(known=known, **{field: value}))
    assert found.fix == f"'*q' is no regular expression: {fix}"


def test_rows_of_an_embedding_without_a_name() -> None:
    known = {"refusal": Refusal("ValueError", "")}
    facts = config(base={"input_embeddings": None}, known=known, trainable_token_indices={"wte": [1]})
    (found,) = told("peft_refuses_the_config", facts)
    assert found.fix.endswith("trainable_token_indices={'embed_tokens': [1]}, not 'wte'")


@pytest.mark.parametrize("message", ["no data in a meta tensor", "an operation on the meta device", "no"])
def test_what_only_a_base_without_values_refuses_is_an_info(message: str) -> None:
    (found,) = told("peft_refuses_the_config", config(known={"refusal": Refusal("ValueError", message)}))
    assert found.severity == ("info" if "meta" in message else "error")


@pytest.mark.parametrize(
    ("task_type", "base", "words"),
    [
        ("CAUSAL_LM", {"task_type": "CAUSAL_LM"}, []),
        ("SEQ_CLS", {"task_type": "CAUSAL_LM"}, ["warning: set task_type='CAUSAL_LM', or load the base as"]),
        ("SEQ_CLS", {}, []),
        ("FEATURE_EXTRACTION", {"task_type": "CAUSAL_LM"}, []),
        (None, {"task_type": "CAUSAL_LM"}, []),
        ("CAUSAL_LM", {"task_type": "CAUSAL_LM", "takes_input_ids": False}, ["warning: set task_type=None"]),
        (None, {"takes_input_ids": False}, []),
    ],
)
def test_a_task_type_beside_its_base(task_type: Any, base: dict[str, Any], words: list[str]) -> None:
    says("task_type_contradicts_the_model", config(Q0, base=base, task_type=task_type), *words)


TIED = {"tied": (("embed", "lm_head"),)}


@pytest.mark.parametrize(
    ("rows", "embedding", "is_told"),
    [
        ({"lm_head": [1]}, "embed", True),
        ({"embed": [1]}, "embed", False),
        ({"lm_head": [1], "embed": [1]}, "embed", False),
        ([1], "embed", False),  # without a name, those of the embedding
        ([1], None, False),
        ({"lm_head": [1]}, None, False),
    ],
)
def test_rows_of_one_of_two_tied_modules(rows: Any, embedding: str | None, is_told: bool) -> None:
    facts = config(Q0, base={**TIED, "input_embeddings": embedding}, trainable_token_indices=rows)
    words = ["name the embedding in trainable_token_indices: {'embed': [...]}"] if is_told else []
    assert [one.fix for one in told("tied_weight_is_adapted_on_one_side", facts)] == words


def test_a_tied_weight_that_is_copied_is_counted() -> None:
    base = {**TIED, "modules": (module("embed", "Embedding", size=64),)}
    facts = config(Q0, base=base, known={"saved_modules": ("embed", "lm_head")})
    says("tied_weight_is_copied_twice", facts, "info: 4,096 numbers 2 times")
    says("tied_weight_is_copied_twice", replace(facts, saved_modules=("embed",)))
    tied = replace(facts.settings, ensure_weight_tying=True)
    says("tied_weight_is_copied_twice", replace(facts, settings=tied))


def test_an_alpha_of_zero_becomes_twice_the_rank() -> None:
    (found,) = told("alpha_is_not_positive", config(layer(rank=4, alpha=0), r=4, lora_alpha=0))
    assert found.fix == "set lora_alpha=8, which gives a scaling of 2"


BLOCK = "layers.0.attn"
PROJECTIONS = {
    "module_names": (BLOCK, f"{BLOCK}.q_proj", f"{BLOCK}.k_proj", "layers.0.norm"),
    "modules": (
        module(f"{BLOCK}.q_proj"),
        module(f"{BLOCK}.k_proj"),
        module("layers.0.norm", kind="LayerNorm"),
    ),
}
NO_PATTERNS = "names in a list are no patterns; give the pattern as one string, "
NAMES_OF_THIS = "use names of this model: k_proj, q_proj; or all of them, target_modules='all-linear'"
WHOLE_NAME = "a string is a regular expression for the whole name; for plain names write "


@pytest.mark.parametrize(
    ("targets", "fix"),
    [
        (["q_proj.weight"], "did you mean 'q_proj'? target_modules=['q_proj']"),
        (["q_proj.lora_A"], "did you mean 'q_proj'? target_modules=['q_proj']"),
        ([f"base_model.model.{BLOCK}.k_proj"], f"did you mean '{BLOCK}.k_proj'? target_modules="),
        (["x.weight"], NAMES_OF_THIS),
        (["q_prj"], "did you mean 'q_proj'? target_modules=['q_proj']"),
        ("q_proj|k_proj", f"{WHOLE_NAME}target_modules=['q_proj', 'k_proj']"),
        ("q_prj", f"{WHOLE_NAME}target_modules=['q_proj']"),
        ("q_proj, x", f"{WHOLE_NAME}target_modules=['q_proj']"),
        (r"layers\..*q_proj\d", "the pattern fits no whole name; name modules instead: target_modules=['q_proj']"),
        (r".*\.zz+", f"the pattern fits no whole name; {NAMES_OF_THIS}"),
        ("*mended", "a string is a regular expression for the whole name: target_modules='.*q_proj'"),
        ("all_linear", "write target_modules='all-linear'"),
        (["all_linear"], "write target_modules='all-linear', as text and not in a list"),
        ("all-linear", NAMES_OF_THIS),
        (["*mended"], f"{NO_PATTERNS}target_modules='.*q_proj'"),
        ([".*zz"], f"{NO_PATTERNS}{NAMES_OF_THIS}"),
    ],
)  # fmt: skip
def test_names_that_match_nothing(targets: Any, fix: str) -> None:
    lost = [targets] if isinstance(targets, str) else targets
    similar = ("q_proj", "k_proj") if lost == ["q_prj"] else ()
    known = {
        "names": tuple(target(name, similar=similar) for name in lost),
        "repairs": Repairs(fitting=(("*mended", ".*q_proj"),)),
    }
    (found,) = told("target_matches_nothing", config(base=PROJECTIONS, known=known, target_modules=targets))
    assert found.fix.startswith(fix)
    assert found.observed.endswith("; nothing is adapted")


def test_of_names_that_match_nothing_the_others_are_kept() -> None:
    names = (target("q_proj", f"{BLOCK}.q_proj"), target("zz"), target("qproj", similar=("q_proj", "k_proj")))
    facts = config(base=PROJECTIONS, known={"names": names[:2]}, target_modules=["q_proj", "zz"])
    (found,) = told("target_matches_nothing", facts)
    assert found.fix == "drop the name: target_modules=['q_proj']; or use names of this model: k_proj"
    assert found.observed.endswith("['zz']; 1 of 2 names match")
    facts = config(base=PROJECTIONS, known={"names": names[::2]}, target_modules=["q_proj", "qproj"])
    (found,) = told("target_matches_nothing", facts)
    assert found.fix.startswith(
        "did you mean 'k_proj'? target_modules=['q_proj', 'k_proj']; else drop the name:"
    )


def test_a_rank_is_lowered_no_more_than_it_has_to_be() -> None:
    facts = config(layer(parameters=80), base={"parameters": 50})
    (found,) = told("parameter_share_is_outside_the_band", facts, Expect(param_ratio=(0.1, 0.5)))
    assert found.fix == "lower r: r=5, lora_alpha=10, or target fewer modules"


@pytest.mark.parametrize(
    ("refusal", "known", "base", "is_told"),
    [
        (Refusal("ValueError", "no"), {}, {}, True),
        (Refusal("ValueError", "no"), {"names": (target("zz"),)}, {}, False),
        (Refusal("ValueError", "no", ("layers.0.q",)), {"names": (target("zz"),)}, {}, True),
        (Refusal("AttributeError", "prepare_inputs_for_generation"), {}, {"task_type": "SEQ_CLS"}, False),
        (Refusal("AttributeError", "prepare_inputs_for_generation"), {}, {}, True),
        (Refusal("AttributeError", "no"), {}, {"task_type": "SEQ_CLS"}, True),
        (Refusal("ValueError", "Orthogonal initialization requires"), {}, {}, False),
    ],
)
def test_what_another_rule_explains_is_not_told_as_a_refusal(
    refusal: Refusal, known: dict[str, Any], base: dict[str, Any], is_told: bool
) -> None:
    facts = config(base=base, known={"refusal": refusal, **known})
    assert bool(told("peft_refuses_the_config", facts)) is is_told


@pytest.mark.parametrize(
    ("layers", "refusal", "is_told"),
    [([0], None, True), ([], None, False), ([0], Refusal("ValueError", "no"), False)],
)
def test_targets_outside_of_numbered_blocks_are_left_out_by_layers(
    layers: list[int], refusal: Refusal | None, is_told: bool
) -> None:
    names = target("q", "layers.0.q"), target("embed", "embed")
    facts = config(
        Q0,
        known={"names": names, "refusal": refusal},
        target_modules=["q", "embed"],
        layers_to_transform=layers,
    )
    words = ["warning: drop ['embed']: target_modules=['q']; or say all in one"] if is_told else []
    says("target_matches_nothing", facts, *words)


SHARING = {**TIED, "modules": (module("embed", "Embedding"), module("lm_head"))}
ALIKE = {**TIED, "modules": (module("embed"), module("lm_head"))}


@pytest.mark.parametrize(
    ("base", "adapted", "saved", "live", "observed"),
    [
        (SHARING, ["embed"], (), False, "embed is a LoRA target, but shares its weight with lm_head (tied"),
        (SHARING, ["lm_head"], (), True, "lm_head is a LoRA target, but shares its weight with embed (tied"),
        (
            SHARING,
            ["embed", "lm_head"],
            (),
            False,
            "embed and lm_head share one weight (tied embeddings), and",
        ),
        (ALIKE, ["embed", "lm_head"], (), False, None),
        (SHARING, [], ("embed",), False, "embed is in modules_to_save, but shares its weight with lm_head"),
        (SHARING, [], ("embed", "lm_head"), False, None),
        (SHARING, [], ("embed",), True, None),
        (SHARING, ["layers.0.q"], (), False, None),
    ],
)
def test_one_of_two_modules_that_share_a_weight(
    base: dict[str, Any], adapted: list[str], saved: tuple[str, ...], live: bool, observed: str | None
) -> None:
    layers = [layer(name) for name in adapted]
    known = {"saved_modules": saved, "live": live}
    found = told("tied_weight_is_adapted_on_one_side", config(*layers, base=base, known=known))
    assert len(found) == (observed is not None)
    assert all(one.observed.startswith(observed or "") for one in found)
