"""From operations to hours and money: plain arithmetic on figures that are stated."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import SweepResult, TrialRow, card_table, estimate_memory, price, rank_prices, suggest_rank
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.facts.operations import CARDS, StepFlops, card_named

BASE = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
)
STEP: dict[str, Any] = {"batch_size": 2, "seq_len": 64}
RATE = price("H100", per_hour=2.5, utilisation=0.4)


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def test_hours_and_money_by_hand() -> None:
    cost = RATE.of(10**18, steps=3)
    assert cost.hours == pytest.approx(3e18 / (989.4e12 * 0.4) / 3600)
    assert cost.money == pytest.approx(2.5 * cost.hours)
    assert str(cost) == (
        "3 EFLOP: 2.1 h, 5.26 (H100 at 40 % of 989.4 TFLOP/s, 2.5 an hour; NVIDIA H100 (SXM5) architecture whitepaper "
        "(1,978.9 with sparsity), bfloat16)"
    )
    assert RATE.of(StepFlops(10, 20)).flops == 30


def test_figures_of_ones_own_come_first_and_nothing_is_hidden() -> None:
    own = price("our card", peak_tflops=100, utilisation=0.25)
    assert str(own.of(10**15)) == "1 PFLOP: 40 s (our card at 25 % of 100 TFLOP/s; the peak is yours)"
    assert own.of(1).money is None
    assert "as commonly cited" in str(price("L4", utilisation=0.5))
    assert "as commonly cited" not in str(RATE)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("nvidia h100", "H100"),
        ("H100 PCIe", "H100-PCIe"),
        ("A100 80GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla T4", "T4"),
        ("Instinct MI300X", "MI300X"),
        ("H1000", None),
        ("", None),
    ],
)
def test_cards_are_found_as_people_and_torch_call_them(written: str, name: str | None) -> None:
    found = card_named(written)
    assert (found and found.name) == name


def test_every_card_has_its_sheet() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert card.source.startswith(("NVIDIA", "AMD"))
        assert card_named(card.name) is card


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, r"price\(\) missing 1 required keyword-only argument: 'utilisation'"),
        ({"utilisation": 0.4}, TypeError, "price needs card=, such as 'H100', or peak_tflops="),
        (
            {"card": "H100", "utilisation": 40},
            ValueError,
            "utilisation must be a finite number above 0 and at most 1",
        ),
        (
            {"card": "Z9", "utilisation": 0.4},
            ValueError,
            "card: there is no peak of 'Z9' here; give peak_tflops=",
        ),
        ({"card": "H100", "utilisation": 0.4, "per_hour": -1}, ValueError, "per_hour must be"),
        ({"card": 9, "utilisation": 0.4}, TypeError, "card must be a name such as 'H100', not 9"),
    ],
)
def test_a_price_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        price(**arguments)


def test_what_has_no_operations_is_told_where_to_go() -> None:
    with pytest.raises(TypeError, match=r"for a sweep: result\.prices\(price\)"):
        RATE.of(SweepResult("a", True, None, (), {}, {}))
    with pytest.raises(TypeError, match=r"for ranks: rank_prices\("):
        RATE.of(suggest_rank(BASE, purpose="rl"))
    with pytest.raises(ValueError, match=r"^steps must be at least 1, not 0$"):
        RATE.of(1, steps=0)


def test_each_row_of_ranks_is_an_estimate_of_its_own() -> None:
    table = rank_prices(adapter(), BASE, [32, 8], **STEP, price=RATE, steps=1000)
    assert [row.rank for row in table.rows] == [8, 32]
    for row in table.rows:
        own = estimate_memory(adapter(r=row.rank), BASE, **STEP)
        assert (row.flops, row.peak_allocated) == (own.flops.total, own.peak_allocated)
        assert row.cost == RATE.of(own, steps=1000)
        # 7 matrices of 2 layers: each adds both its sides for a unit of rank, in float32
        assert row.adapter_bytes == 4 * row.rank * 2 * (4 * 256 + 3 * 384)
    first, last = table.rows
    assert table.verdict == (
        f"r=32 costs {100 * (last.flops / first.flops - 1):.2g} % more operations than r=8, "
        f"{format_bytes(last.adapter_bytes - first.adapter_bytes)} more adapter, "
        f"{format_bytes(last.peak_allocated - first.peak_allocated)} more memory."
    )
    assert str(table).splitlines()[1].split() == [
        *("rank", "operations", "against", "the", "first", "adapter", "peak", "time", "money")
    ]
    assert str(table).endswith(f"1,000 steps on {RATE}")
    assert rank_prices(adapter(), BASE, [8], **STEP).verdict == ""
    assert rank_prices(adapter(), BASE, suggest_rank(BASE, purpose="rl"), **STEP).rows[-1].rank == 32


def test_on_a_large_base_the_rank_is_not_what_costs() -> None:
    table = rank_prices(
        adapter(), "meta-llama/Llama-3.1-8B", [8, 32], batch_size=1, seq_len=1024, quantization="nf4"
    )
    assert table.verdict.endswith("more memory: the rank is not what costs.")


def test_cards_take_what_their_memory_holds() -> None:
    peak = estimate_memory(adapter(), BASE, **STEP).peak_allocated
    table = card_table(adapter(), BASE, **STEP, cards=[peak - 1, peak, 3 * peak])
    assert [(row.fits, row.left, row.batch_size > 2) for row in table.rows] == [
        (False, -1, False),
        (True, 0, False),
        (True, 2 * peak, True),
    ]
    assert table.rows[1].batch_size == 2
    assert str(table).splitlines()[1].split() == ["GPU", "memory", "fits", "left", "largest", "batch"]
    with pytest.raises(ValueError, match=r"^cards must not be empty"):
        card_table(adapter(), BASE, **STEP, cards=[])


def sweep(seconds: tuple[float, ...], flops: tuple[int, ...]) -> SweepResult:
    rows = tuple(
        TrialRow(rank, 2 * rank, 0, metric=0.9, seconds=time, flops=count)
        for rank, time, count in zip((4, 8, 16), seconds, flops, strict=True)
    )
    return SweepResult("accuracy", True, 0.5, rows, {}, {})


def test_the_time_rule_is_judged_on_time_and_on_operations() -> None:
    prices = sweep((6.0, 9.0, 10.0), (990, 995, 1000)).prices(RATE)
    assert (prices.time.rank, prices.operations.rank) == (4, None)
    assert prices.verdict == (
        "95 % of the best metric in under 70 % of the largest rank's measured time and operations:\n"
        "  by measured time: r=4, with 60 % of r=16\n"
        "  by operations: no rank; the least, r=4, takes 99 % of r=16\n"
        "  they differ: time that goes with nothing that was computed is waiting (data, start-up, other jobs), and may "
        "be gone on another machine"
    )
    assert prices.total == RATE.of(990 + 995 + 1000)
    assert [row.cost for row in prices.rows] == [RATE.of(990), RATE.of(995), RATE.of(1000)]
    same = sweep((6.0, 9.0, 10.0), (600, 900, 1000)).prices(time_share=0.65)
    assert (same.time.rank, same.operations.rank) == (4, 4)
    assert "differ" not in same.verdict
    assert same.total is None


def test_a_rank_with_too_little_or_nothing_to_compare_with_is_not_named() -> None:
    poor = sweep((1.0, 9.0, 10.0), (1, 995, 1000))
    rows = (TrialRow(4, 8, 0, metric=0.6, seconds=1.0, flops=1), *poor.trials[1:])
    assert SweepResult("accuracy", True, 0.5, rows, {}, {}).prices().time.rank is None
    alone = SweepResult("accuracy", True, 0.5, (TrialRow(4, 8, 0, metric=0.9),), {}, {}).prices()
    assert str(alone.time) == "by measured time: not judged, there are no two ranks to compare"
    with pytest.raises(TypeError, match=r"^price must be what price\("):
        poor.prices("H100")
