"""Tables of cards and servers, held against what their sources imply."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from pytest_lora.facts.cards import CARDS, Card, card_named
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
    ("written", "name"),
    [
        ("NVIDIA H100", "H100"),
        ("rtx 4090", "RTX-4090"),
        ("A100 80GB", "A100"),
        ("h100_pcie", "H100-PCIe"),
        ("H1", None),
    ],
)
def test_cards_by_their_names(written: str, name: str | None) -> None:
    found = card_named(written)
    assert (None if found is None else found.name) == name


@pytest.mark.parametrize("name", SERVERS)
def test_limits_on_ranks_rise_by_little(name: str) -> None:
    server = SERVERS[name]
    assert all(low < high <= 8 * low for low, high in pairwise(server.ranks))
    assert all(rank & (rank - 1) == 0 or rank % 64 == 0 for rank in server.ranks)
    assert server.default_rank is None or server.default_rank in server.ranks or not server.ranks
    assert bool(server.rank_option) or not server.ranks
    assert server.name == f"{server.title} {server.version}"
