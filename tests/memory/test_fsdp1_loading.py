"""What FSDP1 makes on the device while it cuts a model, which stays in the cache."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from transformers import LlamaConfig

from pytest_lora import estimate_memory, step_memory
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.layer_stacks import USUAL, Cut
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.inspection.memory.parallel.model import CUT, Loading, Rank
from pytest_lora.inspection.memory.step import Step
from pytest_lora.memory.setting import checked_setting
from tests.memory.test_parallel import BASE, LORA

EMBEDDINGS = 2 * (2 * BASE.vocab_size + 1) * BASE.hidden_size
"""Bytes of embeddings, head and last norm in bfloat16, which FSDP1 cuts as one."""


def fsdp1(**options: Any) -> dict[str, Any]:
    return {
        "parallel": Parallel(2, "fsdp1", offload=options.pop("offload", None), options=(*options.items(),))
    }


def rank_of(base: Any = BASE, cut: Cut = USUAL, **options: Any) -> Rank:
    rank = build(base, LORA, checked_setting(dtype="bfloat16", **fsdp1(**options)), cut=cut).rank
    assert rank is not None
    return rank


def held(loading: Loading | None) -> list[int]:
    """Bytes after each event."""
    assert loading is not None
    return list(accumulate(loading.sizes[e] if e >= 0 else -loading.sizes[~e] for e in loading.events))


def test_what_is_left_of_cutting_a_model_are_its_parts() -> None:
    rank = rank_of()
    assert held(rank.loading)[-1] == sum(w.size for w in rank.weights if w.category in CUT)


def test_parts_in_the_memory_of_the_host_leave_nothing() -> None:
    assert held(rank_of(offload="cpu").loading)[-1] == 0


@pytest.mark.parametrize(("sent", "copies"), [(True, 3), (False, 2)])
def test_embeddings_lie_beside_their_copies_until_they_are_cut(sent: bool, copies: int) -> None:
    """Whole, sent as one to the other ranks, and then flattened in the place of what was sent, beside the part."""
    rank = rank_of(sync_module_states=sent)
    levels = held(rank.loading)
    part = EMBEDDINGS // 2
    layers = levels[-1] - part
    assert max(levels) == layers + 2 * EMBEDDINGS + part, "whole, flat and the part of it"
    assert rank.loading is not None
    as_large = [size for size in rank.loading.sizes if EMBEDDINGS <= size < EMBEDDINGS + 1024]
    assert len(as_large) == copies - 1, "flat, and as it was sent"


def test_the_cache_keeps_what_cutting_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """With embeddings that outweigh a short step, as those of large vocabularies do."""
    base = LlamaConfig(**{**BASE.to_dict(), "vocab_size": 400_000})
    most = max(held(rank_of(base).loading))
    whole = step_memory(LORA, base, **fsdp1()).peak_reserved(1, 8)
    monkeypatch.setattr(Step, "load", lambda *_: None)
    step = step_memory(LORA, base, **fsdp1(limit_all_gathers=1)).peak_reserved(1, 8)
    assert step < most < whole


def test_reserved_memory_at_other_points_counts_it_too() -> None:
    memory, alone = (step_memory(LORA, BASE, **fsdp1(limit_all_gathers=all_)) for all_ in (True, 1))
    memory.peak_reserved(2, 16, 8)
    memory.peak_reserved(3, 24, 8)
    assert memory.peak_reserved(4, 48, 16) == alone.peak_reserved(4, 48, 16)


def test_the_peak_of_cutting_is_that_of_all_layers_and_said_where_a_step_takes_less() -> None:
    base = LlamaConfig(**{**BASE.to_dict(), "vocab_size": 400_000})
    rank = rank_of(base, Cut(0))
    beside = sum(w.size for w in rank.weights if w.category not in CUT)
    asked: dict[str, Any] = {"batch_size": 1, "gradient_checkpointing": True}
    short, long = (estimate_memory(LORA, base, seq_len=n, **fsdp1(), **asked) for n in (8, 2048))
    assert short.loading == long.loading
    assert short.loading == pytest.approx(max(held(rank.loading)) + beside, rel=1e-3)
    assert long.peak_allocated > short.loading > short.peak_allocated
    assert short.fits(short.loading)
    assert not short.fits(short.loading - 1)
    assert "while it is loaded" in str(short)
    assert "while it is loaded" not in str(long)
    other = estimate_memory(LORA, base, seq_len=8, gpus=2, strategy="fsdp2", **asked)
    assert other.loading == 0
