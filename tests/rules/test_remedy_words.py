"""What several rules advise, word for word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig

from pytest_lora import Expect
from pytest_lora.bases.examples.models import BASES
from pytest_lora.changes import Advice, advise
from pytest_lora.facts.saved_config import ResumptionFacts
from pytest_lora.facts.served import ServedAdapter, ServedModule
from pytest_lora.facts.servers import SERVERS, Feature, Outcome
from pytest_lora.facts.settings import Settings
from pytest_lora.inspection.config import config_facts
from pytest_lora.rules import remedies
from pytest_lora.rules.serving_words import _fix, shown, treated


def settings(**fields: Any) -> Settings:
    return Settings.of(LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["q"], **fields}))


def test_small_remedies() -> None:
    assert remedies.without(("a", "b", "c"), "b", "d") == ("a", "c")
    assert remedies.optimizer_anew(2e-4).endswith("lr=0.0002)")


@pytest.mark.parametrize(
    ("config", "rank", "fields"),
    [
        ({}, None, {"lora_alpha": 24.0}),
        ({}, 4, {"lora_alpha": 12.0}),
        ({"use_rslora": True, "r": 16}, None, {"lora_alpha": 12.0}),
        ({"use_rslora": True}, 4, {"lora_alpha": 6.0}),
        ({"alpha_pattern": {"q": 4}}, None, {"alpha_pattern": {"q": 24.0}}),
        ({"alpha_pattern": {"v": 4}}, None, {"lora_alpha": 24.0}),
        ({"alpha_pattern": {"v": 4}, "rank_pattern": {"q": 2}}, None, {"alpha_pattern": {"v": 4, "q": 6.0}}),
    ],
)
def test_a_scaling_of_three(config: dict[str, Any], rank: int | None, fields: dict[str, Any]) -> None:
    assert remedies.scaled(settings(**config), "q", 3.0, rank) == fields


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {"r": 4, "lora_alpha": 8.0}),
        ({"rank_pattern": {"q": 2}}, {"rank_pattern": {"q": 4}, "alpha_pattern": {"q": 32.0}}),
        ({"rank_pattern": {"v": 2}}, {"r": 4, "lora_alpha": 8.0}),
        ({"lora_alpha": 0}, {"r": 4, "lora_alpha": 8.0}),
    ],
)
def test_a_rank_of_four_keeps_its_scaling(config: dict[str, Any], fields: dict[str, Any]) -> None:
    assert remedies.ranked(settings(**config), "q", 4) == fields


def test_fields_of_a_checkpoint() -> None:
    fresh = remedies.START_FRESH
    assert remedies.as_in_checkpoint(ResumptionFacts("out", None), "r") == Advice(fresh)
    facts = ResumptionFacts("out", None, saved=settings(rank_pattern={"q": 2}))
    fix = remedies.as_in_checkpoint(facts, "r", "rank_pattern")
    assert fix.text == f"r=8, rank_pattern={{'q': 2}}, as in the checkpoint; or {fresh}"
    assert [one.settings for one in fix.changes] == [{"r": 8, "rank_pattern": {"q": 2}}]


def test_rates_and_ranks() -> None:
    assert remedies.lower_rate(None, 10) == remedies.lower_rate(0.0, 10) == "divide the learning rate by 10"
    assert remedies.lower_rate(1e-3, 10) == "lower the learning rate from 0.001 to 0.0001"
    same = "the scaling is the same then, and the learning rate"
    assert remedies.next_rank(Expect(), None) == f"double the rank and lora_alpha with it ({same} can stay)"
    plain: Any = SimpleNamespace(r=8, lora_alpha=16)
    assert remedies.next_rank(SimpleNamespace(config=plain), 1e-3) == (
        f"double the rank from 8 to 16 and lora_alpha with it from 16 to 32 ({same} of 0.001 can stay)"
    )
    rooted = Expect(config=LoraConfig(r=8, lora_alpha=16, use_rslora=True))
    assert remedies.next_rank(rooted, 1e-3) == (
        "double the rank from 8 to 16 with the lora_alpha of 16 and the learning rate of 0.001 as they are"
    )


ROWS = [
    ("base", "model.embed_tokens", {}, ["modules_to_save=['embed_tokens']", "{'embed_tokens': list(range(100, 103))}"]),
    ("base", "model.embed_tokens", {"modules_to_save": ["norm"]}, ["modules_to_save=['norm', 'embed_tokens']", "rows"]),
    ("base", "lm_head", {}, ["modules_to_save=['lm_head']"]),
    ("base", "model.embed_tokens", {"trainable_token_indices": [5]}, ["{'embed_tokens': [5] + list(range(100, 103))}"]),
    (
        "base",
        "lm_head",
        {"trainable_token_indices": {"embed_tokens": [5]}},
        ["modules_to_save=['lm_head']"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("base", "side", "fields", "ways"), ROWS)
def test_rows_that_were_added(base: str, side: str, fields: dict[str, Any], ways: list[str]) -> None:
    facts = config_facts(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], **fields), BASES[base]())
    found = [advise(way).text for way in remedies.ways_to_train_rows(facts, side, 100, 3)]
    assert len(found) == len(ways)
    assert all(words in way for words, way in zip(ways, found, strict=True)), found


# ------------------------------------------------------------------ servers


def served(features: dict[Feature, tuple[str, ...]], *modules: ServedModule, **fields: Any) -> ServedAdapter:
    found = modules or (ServedModule("model.layers.0.q_proj", "linear", 8, 16),)
    return ServedAdapter("out", settings(**fields), found, features)


FIXES: list[tuple[Feature, dict[str, Any], str]] = [
    ("rslora", {"use_rslora": True, "r": 16}, "write use_rslora=False, lora_alpha=64: the same scaling"),
    ("padded_rank", {"r": 4, "lora_alpha": 8}, "to 16, and write r=16 and lora_alpha=32;"),
    ("padded_rank", {"r": 4, "lora_alpha": 8, "use_rslora": True}, "write r=16 and lora_alpha=16;"),
    ("target_pattern", {}, "target_modules=['k_proj', 'q_proj']"),
    ("dora", {}, "merge the adapter into the base"),
    ("alora", {}, "train again without it, or merge"),
]


@pytest.mark.parametrize(("feature", "fields", "words"), FIXES)
def test_a_fix_for_a_server(feature: Feature, fields: dict[str, Any], words: str) -> None:
    modules = [
        ServedModule(f"layers.0.{leaf}", "linear", rank, 1) for leaf, rank in (("q_proj", 9), ("k_proj", 4))
    ]
    adapter = served({feature: ("q",)}, *modules, **fields)
    assert adapter.settings is not None
    assert words in advise(_fix(adapter, adapter.settings, feature)).text
    if feature == "rslora":
        patterns = served({feature: ("q",), "alpha_pattern": ("q",)}, **fields)
        assert "multiply each lora_B by the scaling" in advise(_fix(patterns, adapter.settings, feature)).text


def test_names_that_are_shown() -> None:
    assert shown(("a", "b", "c")) == "a, b, c"
    assert shown(("a", "b", "c", "d")) == "a, b, c and 1 more"


LINEAR = ServedModule("model.layers.0.router", "linear", 8, 16)
SERVED: list[tuple[str | None, ServedAdapter, Outcome, list[str]]] = [
    ("vllm", served({"dora": ("use_dora",)}), "refuses", ["refuses DoRA (use_dora): it raises"]),
    ("vllm", served({"dora": ("use_dora",)}), "drops", []),
    (None, served({"dora": ("use_dora",)}), "refuses", []),
    ("vllm", ServedAdapter("out", None, features={"dora": ("use_dora",)}), "refuses", []),
    ("tgi", served({}, LINEAR), "drops", ["a target that it does not know (router)"]),
    ("tgi", served({}, ServedModule("model.x", "embedding", 8, 16)), "drops", []),
    ("vllm", served({}, LINEAR), "drops", []),
    ("tgi", served({"ranks_by_layer": ("q",), "padded_rank": ("q",)}), "rescales", []),
    ("lorax", served({"padded_rank": ("q", "q", "v")}), "rescales", ["a rank that it pads (q, v)"]),
]


@pytest.mark.parametrize(("server", "adapter", "outcome", "words"), SERVED)
def test_what_a_server_makes_of_it(
    server: Any, adapter: ServedAdapter, outcome: Outcome, words: list[str]
) -> None:
    found = [
        f"{one.severity or 'error'}: {one.observed}"
        for one in treated(adapter, Expect(serve=server), outcome)
    ]
    assert len(found) == len(words), found
    assert all(expected in one for expected, one in zip(words, found, strict=True)), found


def test_what_a_server_only_warns_of_is_a_warning() -> None:
    for name, server in SERVERS.items():
        for feature, treatment in server.features.items():
            found = list(treated(served({feature: ("q",)}), Expect(serve=name), treatment.outcome))
            own = [one for one in found if "(q)" in one.observed]
            assert [one.severity for one in own] == ["warning" if treatment.warns else None], (name, feature)
