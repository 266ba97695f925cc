"""Losses without all logits, and fused kernels: what they keep for the backward, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import check_memory, estimate_memory
from pytest_lora.inspection.memory import dry_run
from pytest_lora.inspection.memory.dry_run import Trace
from pytest_lora.inspection.memory.fused_losses import FORMULAS, liger_chunk
from pytest_lora.inspection.memory.layer_stacks import Cut
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.memory.setting import checked_setting

WIDTH, INNER, WORDS, LAYERS = 64, 256, 32_000, 2
BATCH, LENGTH = 2, 96
TOKENS = BATCH * LENGTH
BASE: Any = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_attention_heads=4,
    num_hidden_layers=LAYERS,
    vocab_size=WORDS,
)
ALL = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
CHUNKED = hasattr(torch.nn.functional, "linear_cross_entropy")


def traced(config: LoraConfig = ALL, **setting: Any) -> Trace:
    asked = replace(checked_setting(dtype="bfloat16", **setting), batch_size=BATCH, seq_len=LENGTH)
    return dry_run.trace(build(BASE, config, asked, cut=Cut(0)), asked)


def counted(trace: Trace) -> int:
    """Floating-point operations of a micro-batch."""
    return sum(flops for _, _, flops in trace.flops)


def held(trace: Trace) -> int:
    """Bytes that the forward leaves to the backward."""
    live: dict[int, int] = {}
    for event, phase in zip(trace.events, trace.phases, strict=True):
        if phase == "backward":
            break
        if event >= 0:
            live[event] = trace.sizes[event]
        else:
            del live[~event]
    return sum(live.values())


@pytest.mark.parametrize(
    ("loss", "largest"),
    [
        pytest.param(
            "chunked",
            4 * WORDS,
            marks=pytest.mark.skipif(not CHUNKED, reason="this torch has no chunked loss"),
        ),
        ("liger", 2 * WORDS),
        ("cut", 8 * WORDS),
    ],
)
def test_no_loss_but_the_full_one_holds_the_logits(loss: Any, largest: int) -> None:
    plainly, fused = traced(), traced(loss=loss)
    logits = TOKENS * WORDS
    assert max(plainly.sizes) == 4 * logits
    of_words = [size for size, kind in zip(fused.sizes, fused.categories, strict=True) if "logits" in kind]
    assert max(of_words) == largest, (
        "a token's logits at a time, as there are more words to a number than tokens; an order of words"
    )
    products = 1 if loss == "cut" else 0
    more = products * 2 * TOKENS * WIDTH * WORDS
    assert counted(fused) == counted(plainly) + more


def test_the_hidden_states_gradient_is_what_liger_keeps_and_log_sum_exps_what_cut_keeps() -> None:
    liger, cut = held(traced(loss="liger")), held(traced(loss="cut"))
    gradient = 2 * TOKENS * WIDTH
    of_cut = (
        TOKENS * (4 + 4) + 4 * WORDS + gradient
    )  # valid tokens, sums, means, and the hidden states themselves
    assert liger - gradient == pytest.approx(cut - of_cut, abs=64)


def test_liger_chunks_as_its_comment_counts() -> None:
    assert liger_chunk(4096 * 4, 4096, 32_000) == 2048
    assert liger_chunk(1, 4096, 32_000) == 1


def test_axolotls_functions_keep_inputs_gate_and_up_alone() -> None:
    plain, fused = held(traced(autocast=False)), held(traced(autocast=False, kernels="axolotl"))
    # PEFT: a float32 copy of each adapted input; and of the gate what its activation makes, and the product.
    copies = 4 * TOKENS * (6 * WIDTH + INNER)
    assert plain - fused >= LAYERS * copies
    doubled = traced(autocast=False, kernels="axolotl", loss="full")
    assert counted(doubled) == pytest.approx(counted(traced(autocast=False)), rel=0.01)


def test_a_layer_that_no_kernel_is_for_stays_as_it_is() -> None:
    some = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    assert traced(some, kernels="axolotl") == traced(some)
    dora = LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    assert traced(dora, kernels="axolotl") == traced(dora)


def test_ligers_layers_keep_inputs_in_their_own_dtype() -> None:
    few = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    plain, fused = held(traced(few, loss="liger")), held(traced(few, kernels="liger"))
    # What is normed stays in bfloat16, not in float32; the first norm has no gradient.
    norms = 2 * LAYERS * TOKENS * (4 - 2) * WIDTH
    gates = LAYERS * TOKENS * 2 * INNER  # what the activation makes
    assert plain - fused == norms + gates
    found = estimate_memory(few, BASE, batch_size=BATCH, seq_len=LENGTH, kernels="liger")
    assert (found.bound, found.setting.loss) == ("at most", "liger")
    assert [line.partition(":")[0] for line in found.by_formula] == [
        "Liger's fused linear cross entropy",
        "Liger's RMSNorm",
        "Liger's SwiGLU",
    ]


def test_an_upper_bound_fails_no_assertion() -> None:
    sizes: dict[str, Any] = {"batch_size": BATCH, "seq_len": LENGTH, "kernels": "liger", "advise": False}
    peak = estimate_memory(ALL, BASE, batch_size=BATCH, seq_len=LENGTH, kernels="liger").peak_allocated
    report = check_memory(ALL, BASE, budget=peak - 1, **sizes)
    assert [finding.code for finding in report.findings] == ["LORA506"]


@pytest.mark.parametrize("method", [None, "nf4"])
@pytest.mark.parametrize("loss", FORMULAS)
def test_each_loss_is_predicted_for_whole_models(loss: Any, method: Any) -> None:
    if loss == "chunked" and not CHUNKED:
        pytest.skip("this torch has no chunked loss")
    full = estimate_memory(ALL, BASE, batch_size=8, seq_len=512, quantization=method)
    fused = estimate_memory(ALL, BASE, batch_size=8, seq_len=512, quantization=method, loss=loss)
    assert fused.peak_allocated < full.peak_allocated - 2 * 8 * 512 * WORDS * 4
    assert FORMULAS[loss] in fused.by_formula
    assert f"by formula: {FORMULAS[loss]}" in str(fused)


def test_what_no_fused_loss_is_for_is_refused_by_name() -> None:
    sizes: dict[str, Any] = {"batch_size": BATCH, "seq_len": LENGTH}
    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"^loss: 'cut' "):
        estimate_memory(saved, BASE, loss="cut", **sizes)
    classifier = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"^loss: 'liger' is computed from the plain head"):
        estimate_memory(classifier, BASE, loss="liger", **sizes)
    with pytest.raises(ValueError, match=r"^loss must be one of full, chunked, liger, cut, not 'fused'"):
        estimate_memory(ALL, BASE, loss="fused", **sizes)
    with pytest.raises(ValueError, match=r"^kernels must be one of liger, axolotl, not 'unsloth'"):
        estimate_memory(ALL, BASE, kernels="unsloth", **sizes)


def test_sequences_without_padding_are_one_row() -> None:
    packed = replace(checked_setting(padding_free=True, dtype="bfloat16"), batch_size=BATCH, seq_len=LENGTH)
    row = replace(checked_setting(dtype="bfloat16"), batch_size=1, seq_len=BATCH * LENGTH)
    of_both = [dry_run.trace(build(BASE, ALL, asked, cut=Cut(0)), asked) for asked in (packed, row)]
    assert max(of_both[0].sizes) == max(of_both[1].sizes)
    assert held(of_both[0]) == pytest.approx(held(of_both[1]), rel=0.02)
