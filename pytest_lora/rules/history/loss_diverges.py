from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from pytest_lora.expect import Expect
from pytest_lora.facts.curve import smoothed, trend
from pytest_lora.facts.curve_shape import FITS, STRAYS, CurveFacts
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.findings import Severity
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import lower_rate

_ABOVE_START = 1.2
"""The healthy runs of ``benchmarks/results/history_runs.json`` end at 0.42 of their start at most; a level of
three losses of batches of one record is off by a tenth."""

_LOST_ERROR, _LOST_WARNING = 0.5, 0.25
"""Shares of the fall that are given back. The healthy runs of ``history_runs.json`` give back 0.06 at most."""

_LOST_CONFIRMED = 0.15
"""Where the last evaluations are worse by ``_ABOVE_LOWEST`` too: more than twice that 0.06."""

_LAST_EVALS = 3
"""One or two evaluations alone may be of hard records."""

_LEARNED = 0.2
"""Below this share of the start there is no fall that could be given back."""

_ABOVE_LOWEST = 1.2
_CLEAR, _CLEAR_FROM_START = 5.0, 2.0
"""Standard errors. The lowest of about 20 levels lies 1.9 of them below a typical one by chance alone; the start is
one level, at the usual two."""

_TREND = 5.0
"""z of a rising trend that no noise makes: one in 3 million runs without one."""

_BOTH_TRENDS, _BOTH_RISE = 3.0, 1.05
"""Where training and evaluation losses rise as one, z of 3 each is less likely than one in 500,000 by chance."""

_FEWEST, _FEW = 5, 20
"""Two batches that come in turn look like a rise in four losses; from 20 on there are levels."""

_SWINGS = 3
_SHORT_RISE, _SHORT_GOES_ON = 2.0, 1.1
"""Among few losses only twice the start counts, and only where it is no first batch that was an easy one."""

_KNEW, _AS_GOOD_AS_NONE = 0.5, 0.8
"""Shares of the loss of a guess. A base that begins below half of it knows its data; from 0.8 on, as in LORA304, a
model knows nothing, which no other text does to one."""

_FIRST = (2, 3, 5)
_OUTRANKED = 0.02
"""Two first losses that lie below 98 % of all later ones are the easiest two of a hundred batches; one in 2,500
runs."""

_SHOT_UP, _SETTLED, _SHOT_UP_NOISE = 1.2, 1.3, 5.0
"""A loss that blows up in the first step climbs on in the next ones, and settles below its peak and above its start."""


@rule("LORA342", severity="error", needs=HistoryFacts)
def loss_diverges(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss ends above where it began, or gives back what it had gained.

    ## What it does
    Compares the level of the last losses with that of the first and with the lowest. It is divergence to end
    20 % above the start, or to give back half of the fall (a quarter: warning; 15 % where the last three
    evaluation losses are 20 % above the best before), where the rise is 5 times what the noise of these levels
    explains, or a rank test shows it over the whole curve, or the first losses lie below nearly all later ones. Where
    the evaluation losses rise with the training losses, 5 % are enough. Of less
    than 20 losses it is also divergence if the last three are at twice the first. A loss below 0.1 is no divergence,
    and one that swings down as well as up is left to LORA345. A loss that jumps from one step to the next after
    a third of the run, and falls steadily from there, may have met other data, and is not judged, unless the last
    three evaluation losses are 20 % above the best before, or a run that began below half of `ln(vocabulary_size)`
    jumps above 80 % of it. What a running mean of noise strays by is not judged either.
    `benchmarks/history_diagnosis.py` measures how often this errs.

    ## Why is this bad?
    The steps are too large: the adapter has left the region in which the base works, and does not come back
    by itself.

    ## Example
    ```python
    report = diagnose_history([2.3, 2.2, 2.1, 2.2, 2.6, 3.1, 3.9, 4.8, 5.6, 6.1, 6.4, 6.6], learning_rate=1e-2)
    ```

    ## Use instead
    ```python
    report = diagnose_history([2.3, 2.2, 2.1, 2.0, 2.0, 1.9, 1.8, 1.8, 1.7, 1.7, 1.7, 1.6], learning_rate=1e-3)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1504
    """
    found = _short(facts) or (facts.curve and _long(facts, facts.curve))
    if found:
        severity, observed = found
        yield Violation(
            where="train_losses",
            observed=observed,
            expected="a loss that falls, and stays down",
            fix=f"load the adapter anew and {lower_rate(facts.learning_rate, 10)}, with warm-up over the first "
            "5 % of the steps and gradients clipped at 1.0",
            severity=severity,
        )


def _short(facts: HistoryFacts) -> tuple[Severity, str] | None:
    if not _FEWEST <= len(facts.usable) < _FEW:
        return None
    (start, second), last = facts.usable[:2], facts.usable[-3:]
    # A first batch may be an easy one; then the second loss is no lower than the last.
    goes_on = median(last) > _SHORT_GOES_ON * second
    if start < 0 or min(last) < max(FITS, _SHORT_RISE * start) or not goes_on:
        return None
    return "error", f"the loss rose from {start:.4g} to {last[-1]:.4g} in {facts.steps} steps"


def _long(facts: HistoryFacts, curve: CurveFacts) -> tuple[Severity, str] | None:
    if curve.end.value < FITS or (curve.may_have_met_other_data and not _forgot(facts, curve)):
        return None
    ends = max(curve.start.value, curve.end.value)
    if curve.wander and ends - curve.lowest.value < STRAYS * curve.wander:
        return None
    return _above_start(facts, curve) or _blew_up_at_once(facts, curve) or _gave_back(facts, curve)


def _above_start(facts: HistoryFacts, curve: CurveFacts) -> tuple[Severity, str] | None:
    start, end = curve.start.value, curve.end.value
    rises = (_clear(curve) and curve.end.above(curve.start) > _CLEAR_FROM_START) or curve.trend > _TREND
    if outranked := _outranked(facts.usable):
        start, rises = outranked, True
    if rises and end > _ABOVE_START * start:
        return "error", f"the loss began at {start:.4g} and is {end:.4g} after {facts.steps} steps"
    if _both_rise(facts, curve):
        first, last = facts.evals[0].loss, facts.evals[-1].loss
        return (
            "warning",
            f"the training loss rose from {start:.4g} to {end:.4g}, and the evaluation loss from {first:.4g} "
            f"to {last:.4g}",
        )
    return None


def _clear(curve: CurveFacts) -> bool:
    lowest, end = curve.lowest, curve.end
    return end.value > _ABOVE_LOWEST * lowest.value and end.above(lowest) > _CLEAR


def _outranked(losses: Sequence[float]) -> float | None:
    """The median of the first few losses, if they lie below nearly all later ones."""
    for few in _FIRST:
        first, rest = losses[:few], losses[few:]
        if len(losses) >= _FEW and sum(loss <= max(first) for loss in rest) <= _OUTRANKED * len(rest):
            return median(first)
    return None


def _both_rise(facts: HistoryFacts, curve: CurveFacts) -> bool:
    evals = [one.loss for one in facts.evals]
    return (
        min(curve.trend, trend(evals)) > _BOTH_TRENDS
        and curve.end.value > _BOTH_RISE * curve.start.value
        and evals[-1] > _BOTH_RISE * evals[0]
    )


def _blew_up_at_once(facts: HistoryFacts, curve: CurveFacts) -> tuple[Severity, str] | None:
    """The first loss is that of the base, and the first step has destroyed what the base knows."""
    first, rest, end = facts.usable[0], facts.usable[1:], curve.end.value
    if len(rest) < _FEW or sum(loss <= first for loss in rest) > _OUTRANKED * len(rest):
        return None
    second, peak = rest[0], max(smoothed(rest[: len(rest) // 4], 3))
    climbs = peak > _SHOT_UP * second and peak - second > _SHOT_UP_NOISE * curve.noise
    if not climbs or peak < _SETTLED * end or end < _ABOVE_START * first:
        return None
    return (
        "error",
        f"the loss began at {first:.4g}, shot up to {peak:.4g} within the first steps and is {end:.4g} after "
        f"{facts.steps} steps",
    )


def _gave_back(facts: HistoryFacts, curve: CurveFacts) -> tuple[Severity, str] | None:
    start, lowest, end = curve.start, curve.lowest, curve.end
    fall, rise = start.value - lowest.value, end.value - lowest.value
    learned = fall > _LEARNED * start.value and start.above(lowest) > _CLEAR_FROM_START
    least = _LOST_CONFIRMED if _evals_confirm(facts) else _LOST_WARNING
    if not _clear(curve) or curve.swings >= _SWINGS or not (learned and rise > least * fall):
        return None
    return (
        "error" if rise > _LOST_ERROR * fall else "warning",
        f"the loss fell from {start.value:.4g} to {lowest.value:.4g} at step {facts.step(lowest.middle)} and is "
        f"{end.value:.4g} after {facts.steps} steps: {rise / fall:.0%} of the fall is lost",
    )


def _forgot(facts: HistoryFacts, curve: CurveFacts) -> bool:
    """Whether a jump took away what the model knew, whatever data it met."""
    if facts.chance is None or curve.jump is None:
        return _evals_confirm(facts)
    fell_apart = (
        curve.start.value < _KNEW * facts.chance and curve.jump.after > _AS_GOOD_AS_NONE * facts.chance
    )
    return fell_apart or _evals_confirm(facts)


def _evals_confirm(facts: HistoryFacts) -> bool:
    """Whether what was learned is lost on the records of the evaluation too."""
    losses = [one.loss for one in facts.evals]
    before, last = losses[:-_LAST_EVALS], losses[-_LAST_EVALS:]
    return bool(before) and min(last) > _ABOVE_LOWEST * min(before)
