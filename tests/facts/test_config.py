"""What a configuration means on one base, from facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from peft import LoraConfig

from pytest_lora.bases.examples.models import BASES
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.settings import Settings, is_named
from pytest_lora.inspection.config import config_facts
from pytest_lora.patterns import deciding_key, matches


@pytest.fixture(scope="module")
def facts() -> ConfigFacts:
    """A small Llama, adapted on q_proj and v_proj."""
    return config_facts(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), BASES["base"]())


def meant(**fields: Any) -> Settings:
    return Settings.of(LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **fields}))


@pytest.mark.parametrize(
    ("indices", "rows"),
    [
        ((("", (1, 2)),), {1, 2}),
        ((("embed_tokens", (3,)), ("lm_head", (4,))), {3}),
        ((("model.embed_tokens", (3,)), ("lm_head", (4,))), {3}),
        ((("", (1,)), ("embed_tokens", (3,))), {1, 3}),
        # A head that is tied is trained by the rows of the embedding.
        ((("lm_head", (4,)),), {4}),
    ],
)
def test_rows_are_those_of_the_embedding_or_what_it_is_tied_to(
    facts: ConfigFacts, indices: Any, rows: set[int]
) -> None:
    settings = replace(facts.settings, trainable_token_indices=indices)
    trained = replace(facts, settings=settings, token_modules=("model.embed_tokens",))
    assert trained.trained_rows("model.embed_tokens") == rows
    assert trained.trained_rows("lm_head") is None


def test_modules_that_are_saved_train_in_full(facts: ConfigFacts) -> None:
    adapters = sum(layer.parameters for layer in facts.layers)
    assert facts.trainable_parameters == adapters == 2 * 8 * (64 + 64) + 2 * 8 * (64 + 32)
    saved = replace(facts, saved_modules=("model.layers.0.mlp",))
    assert saved.keeps("model.layers.0.mlp")
    assert saved.keeps("model.layers.0.mlp.up_proj")
    assert not saved.keeps("model.layers.0.mlp_2")
    whole = sum(
        m.in_features * m.out_features for m in facts.base.modules if m.name.startswith("model.layers.0.mlp.")
    )
    assert saved.trainable_parameters == adapters + whole


def names(found: frozenset[str] | None) -> set[str]:
    assert found is not None
    return {name.removeprefix("model.layers.") for name in found}


def test_what_another_configuration_would_adapt(facts: ConfigFacts) -> None:
    assert facts.would_adapt(meant(target_modules=None)) is None
    assert names(facts.would_adapt(meant())) == {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    assert names(facts.would_adapt(meant(layers_to_transform=[1]))) == {"1.self_attn.q_proj"}
    assert names(
        facts.would_adapt(meant(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]))
    ) == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
    }
    assert names(facts.would_adapt(meant(target_modules=r".*layers\.0.*[qk]_proj"))) == {
        "0.self_attn.q_proj",
        "0.self_attn.k_proj",
    }
    everything = facts.would_adapt(meant(target_modules="all-linear"))
    assert everything is not None
    assert len(everything) == 14
    assert "lm_head" not in everything
    saved = facts.would_adapt(meant(target_modules="all-linear", modules_to_save=["mlp"]))
    assert saved is not None
    assert len(saved) == 8


@pytest.mark.parametrize(
    ("module", "name", "named"),
    [
        ("a.q_proj", "q_proj", True),
        ("q_proj", "q_proj", True),
        ("a.my_q_proj", "q_proj", False),
        ("a.q_proj.b", "q_proj", False),
    ],
)
def test_names_mean_whole_parts(module: str, name: str, named: bool) -> None:
    assert is_named(module, name) is named


def test_patterns_are_read_as_peft_reads_them() -> None:
    assert deciding_key(["k_proj", "q_proj", r"layers\.1.*"], "model.layers.1.self_attn.q_proj") == "q_proj"
    assert deciding_key([r"layers\.1.*", "q_proj"], "model.layers.1.self_attn.q_proj") == r"layers\.1.*"
    assert deciding_key(["_proj"], "model.q_proj") is None
    assert deciding_key(["("], "model.q_proj") is None
    assert matches(r".*q_proj", "model.q_proj")
    assert not matches(r"q_proj", "model.q_proj")
    assert not matches("(", "model.q_proj")
    patterned = meant(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 32}, use_rslora=True)
    assert (patterned.rank_of("a.q_proj"), patterned.rank_of("a.v_proj")) == (4, 8)
    assert (patterned.alpha_of("a.q_proj"), patterned.alpha_of("a.v_proj")) == (16, 32)
    assert patterned.scaling_of("a.q_proj") == 8
    assert replace(patterned, use_rslora=False).scaling_of("a.q_proj") == 4
    assert replace(patterned, rank_pattern=(), r=0).scaling_of("a.q_proj") is None
    assert replace(patterned, rank_pattern=(), r=1).scaling_of("a.q_proj") == 16


@pytest.mark.parametrize(
    ("module", "layers", "skipped"),
    [
        ("model.layers.3.q", (3,), False),
        ("model.layers.3.q", (2,), True),
        ("model.layers.3.q", (), False),
        ("lm_head", (3,), True),
        ("a.3.b.4.q", (3,), False),
        ("a.3.b.4.q", (4,), True),
        (f"a.{'1' * 12}.3.q", (3,), False),
        (f"a.{'1' * 11}.3.q", (3,), True),
    ],
)
def test_layers_that_are_left_out(module: str, layers: tuple[int, ...], skipped: bool) -> None:
    assert replace(meant(), layers_to_transform=layers).skips_layer_of(module) is skipped
