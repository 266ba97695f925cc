"""Operations of a step are those that torch counts while it runs, and those that are known of it by arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from pytest_lora import estimate_memory
from pytest_lora.facts.operations import StepFlops, format_flops
from pytest_lora.inspection.memory import storage_tracker
from pytest_lora.inspection.memory.operations import (
    FlopsSurface,
    flops_of,
    require_like_inner_units,
    times_played,
)
from pytest_lora.inspection.memory.predictor import Predictor
from pytest_lora.inspection.memory.timeline import NotRepeatingError
from pytest_lora.memory.setting import checked_setting

BATCH, LENGTH, VOCABULARY = 2, 17, 97
aten: Any = torch.ops.aten


def base(layers: int, attention: str) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    config._attn_implementation = attention
    return config


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def counted_on_cpu(config: LlamaConfig, lora: LoraConfig, checkpointing: Any) -> int:
    """What torch counts in a real step; the CPU's own attention is given the formula of the others."""
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted: Any = get_peft_model(model, lora).train()
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        adapted(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("layers", "attention"), [(2, "eager"), (8, "sdpa")])
def test_a_real_step_computes_as_much(layers: int, attention: str, checkpointing: bool) -> None:
    config, lora = base(layers, attention), adapter()
    estimate = estimate_memory(
        lora,
        config,
        batch_size=BATCH,
        seq_len=LENGTH,
        autocast=False,
        gradient_checkpointing=checkpointing,
    )
    assert estimate.flops.total == counted_on_cpu(config, lora, checkpointing)


def test_micro_batches_add_up() -> None:
    one, four = (
        estimate_memory(adapter(), base(2, "sdpa"), batch_size=2, seq_len=16, accumulation=count).flops
        for count in (1, 4)
    )
    assert four == StepFlops(4 * one.forward, 4 * one.backward)


def by_hand(
    tokens: int, layers: int, rank: int, hidden: int, inner: int, groups: float, vocabulary: int
) -> int:
    """Forward of a Llama: weights, adapters on all linear layers of them, head, and the scores of attention."""
    shapes = [
        (hidden, hidden),
        (hidden, int(hidden * groups)),
        (hidden, int(hidden * groups)),
        (hidden, hidden),
    ]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = sum(one * other for one, other in shapes)
    factors = sum(rank * (one + other) for one, other in shapes)
    scores = 2 * tokens * hidden
    return 2 * tokens * (layers * (weights + factors + scores) + hidden * vocabulary)


def is_by_hand(found: int, known: int, tokens: int, head: int) -> bool:
    """Older transformers multiply positions and frequencies of the rotary embedding as matrices."""
    return found - known in (0, tokens * head)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_packed_weights_multiply_like_whole_ones(quantization: str | None) -> None:
    estimate = estimate_memory(
        adapter(), base(8, "sdpa"), batch_size=1, seq_len=64, quantization=quantization, autocast=False
    )
    assert is_by_hand(estimate.flops.forward, by_hand(64, 8, 4, 64, 128, 0.5, VOCABULARY), 64, 16)


def test_experts_of_a_mixture_multiply_the_rows_that_they_get() -> None:
    tokens, hidden, inner, experts, chosen = 64, 64, 128, 4, 2
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        vocab_size=VOCABULARY,
        sliding_window=None,
    )
    lora = adapter(target_modules=["q_proj", "v_proj"])
    found = estimate_memory(lora, config, batch_size=1, seq_len=tokens).flops.forward
    attention = 4 * hidden * hidden + 2 * 4 * 2 * hidden + 2 * tokens * hidden
    layer = attention + hidden * experts + chosen * 3 * hidden * inner
    assert is_by_hand(found, 2 * tokens * (8 * layer + hidden * VOCABULARY), tokens, 16)


LLAMA_70B = 70_553_706_496
"""Parameters of Llama-3.1-70B, embeddings and head included."""


@pytest.mark.parametrize(("checkpointing", "share"), [(False, 4 / 6), (True, 6 / 6)])
def test_a_70b_costs_six_operations_a_parameter_and_token_but_for_the_weights_gradients(
    checkpointing: bool, share: float
) -> None:
    """Of 6: forward 2, gradients of activations 2, gradients of weights 2, which frozen weights have not."""
    tokens = 1024
    estimate = estimate_memory(
        adapter(r=16),
        "meta-llama/Llama-3.1-70B",
        batch_size=1,
        seq_len=tokens,
        quantization="nf4",
        gradient_checkpointing=checkpointing,
    )
    rule = 6 * LLAMA_70B * tokens * share
    assert abs(estimate.flops.total / rule - 1) < 0.03
    known = by_hand(tokens, 80, 16, 8192, 28672, 1 / 8, 128256)
    assert is_by_hand(estimate.flops.forward, known, tokens, 128)


def test_many_points_give_what_one_trace_gives() -> None:
    point = (5, 201, 7)
    predictor = Predictor(base(2, "eager"), adapter(), checked_setting())
    for asked in ((2, 33, 4), (3, 50, 6)):
        predictor.flops(*asked)
    found = predictor.flops(*point)
    assert point not in predictor._traced
    assert found == predictor._trace(point).step.flops


def test_a_polynomial_that_gives_no_whole_number_is_none() -> None:
    grid = [(batch, length, rank) for batch in (2, 3) for length in (2, 4, 6) for rank in (8, 16)]

    def truth(batch: int, length: int, rank: int) -> StepFlops:
        return StepFlops(batch * length * (length + 3 * rank), 7 * batch * rank)

    surface = FlopsSurface(grid, [truth(*point) for point in grid])
    assert surface((11, 4097, 3)) == truth(11, 4097, 3)
    bent = FlopsSurface(grid, [truth(*point) if point[2] == 8 else StepFlops(1, 1) for point in grid])
    assert bent((2, 3, 9)) is None


def test_inner_layers_that_differ_stand_for_nobody() -> None:
    counts = [
        (-1, "forward", 5),
        (2, "forward", 3),
        (2, "forward", 4),
        (3, "forward", 7),
        (3, "backward", 2),
        (2, "backward", 2),
    ]
    require_like_inner_units(counts, {0: 10})
    assert [times_played(unit, {0: 10}) for unit in (-1, 0, 1, 2, 3, 4)] == [1, 1, 1, 9, 1, 1]
    with pytest.raises(NotRepeatingError, match="different amounts"):
        require_like_inner_units([*counts, (3, "forward", 1)], {0: 10})


def test_own_formulas_are_torchs_where_it_has_one() -> None:
    left, right = torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")
    out = aten.mm.default(left, right)
    counter = FlopCounterMode(display=False)
    assert flops_of(aten.mm.default, (left, right), {}, out) == counter.flop_registry[aten.mm](
        left, right, out_val=out
    )
    assert flops_of(aten.add.Tensor, (left, left), {}, left) == 0
    assert storage_tracker.flops_of is flops_of


def test_operations_are_printed_with_three_digits() -> None:
    assert [format_flops(n) for n in (0, 1_500, 2_345_678, 999_600_000, 81.34e12, 1.2e22)] == [
        "0 FLOP",
        "1500 FLOP",
        "2.35 MFLOP",
        "1 GFLOP",
        "81.3 TFLOP",
        "12,000 EFLOP",
    ]
