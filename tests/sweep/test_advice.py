"""Where to start: ranks from capacity, held against arithmetic on the shapes, and rates with their sources."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig

from pytest_lora import rank_table, suggest_learning_rate, suggest_rank
from pytest_lora.bases.tiny import tiny_config
from pytest_lora.sweep import claims
from pytest_lora.sweep.advice import Purpose, advise
from pytest_lora.sweep.capacity import Capacity, capacity_of


class Shape(NamedTuple):
    """A decoder as its model card gives it: widths of hidden state, queries, keys and feed-forward."""

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    gated: bool = True


BASES = {
    "meta-llama/Llama-3.1-70B": Shape(80, 8192, 64 * 128, 8 * 128, 28672),
    "meta-llama/Llama-3.1-8B": Shape(32, 4096, 32 * 128, 8 * 128, 14336),
    "meta-llama/Llama-3.2-1B": Shape(16, 2048, 32 * 64, 8 * 64, 8192),
    "meta-llama/Llama-2-7b-hf": Shape(32, 4096, 32 * 128, 32 * 128, 11008),
    "Qwen/Qwen2.5-7B": Shape(28, 3584, 28 * 128, 4 * 128, 18944),
    "Qwen/Qwen2.5-0.5B": Shape(24, 896, 14 * 64, 2 * 64, 4864),
    "Qwen/Qwen3-8B": Shape(36, 4096, 32 * 128, 8 * 128, 12288),
    "mistralai/Mistral-7B-v0.1": Shape(32, 4096, 32 * 128, 8 * 128, 14336),
    "google/gemma-2-9b": Shape(42, 3584, 16 * 256, 8 * 256, 14336),
    "HuggingFaceTB/SmolLM2-135M": Shape(30, 576, 9 * 64, 3 * 64, 1536),
    "microsoft/phi-2": Shape(32, 2560, 32 * 80, 32 * 80, 10240, gated=False),
    "google-bert/bert-base-uncased": Shape(12, 768, 768, 768, 3072, gated=False),
}
TOKENS = (1_000_000, 30_000_000, 1_000_000_000, 20_000_000_000)


def by_hand(name: str, shape: Shape) -> tuple[int, int]:
    """Parameters for each unit of rank, and the narrowest side: each matrix adds its two sides."""
    matrices = [
        (shape.hidden, shape.queries),
        (shape.hidden, shape.keys),
        (shape.hidden, shape.keys),
        (shape.queries, shape.hidden),
        *[(shape.hidden, shape.inner)] * (2 if shape.gated else 1),
        (shape.inner, shape.hidden),
    ]
    once = [(768, 768)] if "bert" in name else []  # the layer before BERT's head, which is no part of it
    sides = [*matrices * shape.layers, *once]
    return sum(one + other for one, other in sides), min(min(pair) for pair in sides)


def test_the_shapes_that_are_known_by_heart() -> None:
    assert by_hand("", BASES["meta-llama/Llama-3.1-8B"])[0] == 2_621_440
    assert by_hand("", BASES["meta-llama/Llama-2-7b-hf"])[0] == 2_498_560


@pytest.mark.parametrize("name", BASES)
def test_twelve_bases_and_four_sizes_of_data(name: str) -> None:
    per_rank, narrowest = by_hand(name, BASES[name])
    found = capacity_of(name)
    assert (found.per_rank, found.narrowest) == (per_rank, narrowest)
    for tokens in TOKENS:
        advice = advise(found, "sft", tokens)
        power = 2 ** max(3, math.ceil(math.log2(tokens / per_rank)))
        assert advice.wanted == tokens / per_rank
        assert advice.rank == min(power, narrowest // 2)
        assert advice.rank in advice.ranks
        assert ("full fine-tuning" in advice.reason) == (power > narrowest // 2)


def test_experts_that_peft_adapts_count() -> None:
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_local_experts=4,
        num_key_value_heads=4,
    )
    ranks = rank_table(config, [1, 2], target_modules="all-linear").rows
    assert capacity_of(config).per_rank == ranks[1].trainable - ranks[0].trainable
    attention = capacity_of(config, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert attention.per_rank == 2 * 4 * 2 * 64


def test_the_words_for_a_llama() -> None:
    advice = suggest_rank("meta-llama/Llama-3.1-8B", examples=100_000, tokens_per_example=300)
    first, *said = str(advice).splitlines()
    assert first == (
        "start with r=16 (30,000,000 tokens against 2,621,440 parameters for each unit of rank ask for r=11; rounded "
        "up); measure it: rank_sweep over 8, 16, 32"
    )
    assert said == [f"  - {claim}" for claim in (claims.CAPACITY, claims.ALL_LINEAR, claims.ALPHA)]
    assert said[-1].endswith("disputed; state yours, and compare rates at equal rate x scaling]")
    assert advise(advice.capacity, "sft", 10**9).wanted == pytest.approx(381, abs=1)


def test_small_data_are_not_called_learned_by_heart_and_wide_bases_get_nothing_extra() -> None:
    narrow, wide = Capacity("Narrow", 1, 10**6, 4096), Capacity("Wide", 1, 4 * 10**6, 16384)
    assert advise(narrow, "sft", 10**5).rank == 8
    assert claims.SMALL_DATA in advise(narrow, "sft", 10**5).claims
    assert (advise(narrow, "sft", 64 * 10**6).rank, advise(wide, "sft", 64 * 10**6).rank) == (64, 16)


def test_each_purpose_has_its_own_rule() -> None:
    found = Capacity("Some", 1, 10**6, 4096)
    assert advise(found, "rl", 10**12).ranks == (1, 8, 32)
    assert advise(found, "classification", 10**12).rank == 8
    assert advise(found, "continued pretraining", 10**7).rank == 256
    assert advise(found, "continued pretraining", 10**9).rank == 1024
    assert suggest_rank(tiny_config(), purpose="rl").tokens is None
    assert suggest_rank(tiny_config(), purpose="rl", targets=["q_proj"]).capacity.per_rank < (
        suggest_rank(tiny_config(), purpose="rl").capacity.per_rank
    )


@given(
    st.builds(Capacity, st.just("Any"), st.just(1), st.integers(1, 10**8), st.integers(1, 20_000)),
    st.sampled_from(get_args(Purpose)),
    st.integers(1, 10**13),
)
def test_advice_is_always_a_rank_that_the_targets_can_take(
    found: Capacity, purpose: Purpose, tokens: int
) -> None:
    advice = advise(found, purpose, tokens)
    assert 1 <= advice.rank <= max(1, found.narrowest // 2)
    assert advice.rank in advice.ranks
    assert list(advice.ranks) == sorted(set(advice.ranks))
    assert max(advice.ranks) <= max(1, found.narrowest // 2)
    assert advise(found, purpose, 2 * tokens).rank >= advice.rank


def test_every_claim_has_a_source_and_a_certainty() -> None:
    known = [value for value in vars(claims).values() if isinstance(value, claims.Claim)]
    assert len(known) > 12
    for claim in known:
        assert claim.sources
        assert set(claim.sources) <= set(claims.SOURCES)
        assert claim.sure.startswith(
            ("a rough", "measured", "a convention", "reasoning", "disputed", "one study", "what")
        )
    assert set(claims.SOURCES) == {name for claim in known for name in claim.sources}


def test_rates_follow_purpose_size_and_what_is_known_of_full_training() -> None:
    small, large = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"
    assert [suggest_learning_rate(base).rate for base in (small, large)] == [1e-3, 3e-4]
    assert suggest_learning_rate(large).rates == (1e-4, 3e-4, 9e-4)
    assert suggest_learning_rate(large, purpose="rl").rate == 1e-5
    assert suggest_learning_rate(large, purpose="continued pretraining").rate == 1e-4
    assert suggest_learning_rate(large, full_rate=2e-5).rate == pytest.approx(2e-4)
    short = suggest_learning_rate(large, full_rate=2e-5, steps=100, batch_size=64)
    assert short.rate == pytest.approx(3e-4)
    assert {claims.FIFTEEN_TIMES, claims.LARGE_BATCH} <= set(short.claims)
    assert str(short).startswith(
        "start at 0.0003 (15 times 2e-05, that of full fine-tuning); measure it: a sweep over"
    )
    assert claims.LARGE_BATCH not in suggest_learning_rate(large, batch_size=32).claims


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": 0}, ValueError, "tokens must be at least 1, not 0"),
        ({"tokens": "many"}, TypeError, "tokens must be a whole number, not 'many'"),
        ({}, TypeError, "suggest_rank needs tokens= for sft"),
        ({"examples": 10}, TypeError, "examples: say tokens_per_example too"),
        ({"tokens_per_example": 10}, TypeError, "tokens_per_example: say examples too"),
        ({"tokens": 10, "examples": 10}, TypeError, "tokens: leave examples and tokens_per_example out"),
        (
            {"tokens": 9, "purpose": "chat"},
            ValueError,
            "purpose must be one of 'sft', 'rl', 'classification', 'cont",
        ),
        (
            {"tokens": 9, "targets": ["query"]},
            ValueError,
            r"targets: \['query'\] match no module of LlamaForCausalLM",
        ),
        ({"tokens": 9, "targets": []}, TypeError, "targets must be names of modules or 'all-linear'"),
    ],
)
def test_advice_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        suggest_rank(tiny_config(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"full_rate": 0.0}, ValueError, "full_rate must be"),
        ({"steps": 1.5}, TypeError, "steps must be a whole number, not 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, not 0"),
    ],
)
def test_rates_are_refused_too(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        suggest_learning_rate(tiny_config(), **arguments)
