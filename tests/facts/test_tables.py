"""Tables of cards and servers, held against what their sources imply."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from pytest_lora.facts.operations import CARDS, NO_FLOPS, Card, StepFlops, card_named, format_flops
from pytest_lora.facts.servers import SERVERS

PARTS = {
    "A100": (108, 2048, 1.41),
    "V100": (80, 1024, 1.53),
    "T4": (40, 1024, 1.59),
    "RTX-4090": (128, 512, 2.52),
    "RTX-3090": (82, 512, 1.695),
}
"""Multiprocessors, dense operations of each in a clock, and the boost clock in GHz, of cards whose sheets know no
sparsity or are quoted without it."""


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_peaks_are_half_of_those_with_sparsity_or_what_the_parts_do(card: Card) -> None:
    sparse = re.search(r"\(([\d.,]+)( PFLOPS)? with sparsity\)", card.source)
    if sparse is None:
        processors, operations, clock = PARTS[card.name]
        assert card.tflops == pytest.approx(processors * operations * clock / 1000, rel=0.01)
    else:
        twice = float(sparse[1].replace(",", "")) * (1000 if sparse[2] else 1)
        assert card.tflops == pytest.approx(twice / 2, rel=0.015)


@pytest.mark.parametrize(
    ("written", "name", "tflops", "dtype"),
    [
        ("H200", "H200", 989.0, "bfloat16"),
        ("NVIDIA H100", "H100", 989.4, "bfloat16"),
        ("h100_pcie", "H100-PCIe", 756.0, "bfloat16"),
        ("B200", "B200", 2250.0, "bfloat16"),
        ("A100 80GB", "A100", 312.0, "bfloat16"),
        ("A100-SXM4-40GB", "A100", 312.0, "bfloat16"),
        ("L40S", "L40S", 362.05, "bfloat16"),
        ("A40", "A40", 149.7, "bfloat16"),
        ("L4", "L4", 121.0, "bfloat16"),
        ("A10 24GiB", "A10", 125.0, "bfloat16"),
        ("rtx 4090", "RTX-4090", 165.2, "bfloat16"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090", 71.0, "bfloat16"),
        ("Tesla T4", "T4", 65.0, "float16"),
        ("V100", "V100", 125.0, "float16"),
        ("AMD Instinct MI300X", "MI300X", 1307.4, "bfloat16"),
    ],
)
def test_peaks_by_the_names_of_cards(written: str, name: str, tflops: float, dtype: str) -> None:
    found = card_named(written)
    assert found is not None
    assert (found.name, found.tflops, found.dtype) == (name, tflops, dtype)
    assert card_named(f"{written} X") is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 FLOP"),
        (999_499, "999499 FLOP"),
        (999_500, "1 MFLOP"),
        (1_234_567, "1.23 MFLOP"),
        (999_400_000, "999 MFLOP"),
        (999_500_000, "1 GFLOP"),
        (12.34e9, "12.3 GFLOP"),
        (81.34e12, "81.3 TFLOP"),
        (4e15, "4 PFLOP"),
        (7e18, "7 EFLOP"),
        (999.4e18, "999 EFLOP"),
        (999.5e18, "1,000 EFLOP"),
        (5000e18, "5,000 EFLOP"),
        (123_456e18, "123,456 EFLOP"),
    ],
)
def test_operations_are_written_with_three_digits(count: float, text: str) -> None:
    assert format_flops(count) == text
    assert StepFlops(2, 3).total == 5
    assert tuple(NO_FLOPS) == (0, 0)


def test_ranks_that_vllm_takes() -> None:
    vllm = SERVERS["vllm"]
    assert (vllm.ranks, vllm.default_rank) == ((1, 8, 16, 32, 64, 128, 256, 320, 512), 16)


@pytest.mark.parametrize("name", SERVERS)
def test_limits_on_ranks_rise_by_little(name: str) -> None:
    server = SERVERS[name]
    assert all(low < high <= 8 * low for low, high in pairwise(server.ranks))
    assert all(rank & (rank - 1) == 0 or rank % 64 == 0 for rank in server.ranks)
    assert server.default_rank is None or server.default_rank in server.ranks or not server.ranks
    assert bool(server.rank_option) or not server.ranks
    assert server.name == f"{server.title} {server.version}"
