"""What a sweep leaves open about learning rates: one for all ranks, a best one at the edge, rates that were dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_lora.facts.sweep import rate_text
from pytest_lora.sweep.rows import RankOutcome, RateOutcome


def about_rates(ranks: Sequence[RankOutcome], chosen: int) -> Iterator[str]:
    """Yield what keeps the comparison of ranks from being one of ranks alone.

    Args:
        ranks: The ranks that have a metric.
        chosen: The chosen one of them.
    """
    if all(len(o.rates) < 2 for o in ranks):
        if len(ranks) > 1:
            yield (
                "one learning rate for all ranks: a rank that wants another one looks worse than it is "
                "(learning_rates=(...) tells)"
            )
        return
    if alike := [o.rank for o in ranks if _are_alike(o.rates)]:
        yield (
            f"several rates gave the same numbers to the last digit at {_names(alike)}: "
            "does train use plan.learning_rate?"
        )
        return
    yield from _edges(ranks)
    one = next(o for o in ranks if o.rank == chosen)
    if dropped := [rate for rate in one.rates if rate.budget < 1]:
        whole = max(rate.steps for rate in one.rates if rate.budget == 1)
        if whole > 1 and max(rate.steps for rate in dropped) >= whole:
            yield "the short trainings had as many steps as the full ones: does train use plan.share?"
        shortest = min(rate.budget for rate in dropped)
        yield (
            f"{len(dropped)} of {len(one.rates)} rates of r={chosen} were dropped after {100 * shortest:.3g} % of the "
            "training, and short trainings favour large rates"
        )


def _are_alike(rates: Sequence[RateOutcome]) -> bool:
    seen = [(rate.budget, rate.metrics) for rate in rates if rate.metrics]
    return len(set(seen)) < len(seen)


def edge_of(one: RankOutcome) -> str:
    """Says that a rank's best rate lies at the edge of the grid, and what to try; empty where it does not."""
    rates = [rate.learning_rate for rate in one.rates]
    if len(rates) < 2 or one.learning_rate not in (rates[0], rates[-1]):
        return ""
    edge, inner, word = (
        (rates[-1], rates[-2], "largest")
        if one.learning_rate == rates[-1]
        else (rates[0], rates[1], "smallest")
    )
    return f"the {word} rate tried: try {rate_text(_rounded(edge * edge / inner))}"


def _edges(ranks: Sequence[RankOutcome]) -> Iterator[str]:
    """A line for each edge of the grid at which a rank has its best rate."""
    found: dict[str, list[int]] = {}
    for one in ranks:
        if said := edge_of(one):
            found.setdefault(f"{rate_text(one.learning_rate or 0.0)}, {said}", []).append(one.rank)
    for said, at in found.items():
        yield f"the best rate of {_names(at)} is {said}"


def _rounded(rate: float) -> float:
    """With one digit, as grids of rates are written."""
    return float(f"{rate:.0e}")


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(f"r={rank}" for rank in ranks)
