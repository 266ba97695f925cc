from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.curve import swings
from pytest_lora.facts.curve_shape import FITS, STRAYS, CurveFacts, wander
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import lower_rate

_SWINGS = 3
"""Two swings may be one hard stretch of the data and another; restarts of the schedule are taken off."""

_OVERSHOOT, _TAKEN_BACK = 1.3, 0.5
"""The height of a swing over the start, ``SWING``; one that is not taken back by half is a divergence, LORA342."""

_CLEAR, _CLEAR_EVALUATED = 6.0, 2.5
"""Standard deviations of the noise. The highest of 1,000 running medians over five losses of white noise lies 1.9 above
the middle; noise grows with the loss, so that it takes much more where no evaluation loss is as high."""

_ALTERNATION, _WIDTH = 0.7, 0.25
_FEWEST_ALTERNATING = 20
"""Over 20 losses the alternation of white noise is 0.42 in the middle and 0.7 in 3 of 100 draws, over 40 in 1 of 1,000;
the width is that of batches of one record at a loss below 1."""

_ONE_RECORD = (0.205, -0.45)
"""Standard deviation of the loss of batches of one record as a share of it, ``0.205 * loss**-0.45``: the batch
size 1 of ``benchmarks/results/history_diagnosis.json``. Larger batches are quieter."""

_ABOUT_CHANCE = 0.8
"""Share of the loss of a guess from which on a language model is as good as none; LORA304 takes the same."""

_FEWEST_LOUD = 30
"""A standard deviation of 30 losses is off by an eighth, 1 / sqrt(2 n)."""

_LOUD, _LOUD_ABOVE_CHANCE, _LOUD_WITHOUT_GAIN = 3.5, 2.0, 2.5
"""Times the noise of one record. Labels of a classifier, one a batch, are up to 3 times as loud."""

_WITHOUT_GAIN = 2.0
"""Nats. Below this loss a level no lower than the start may be that of few classes, of preferences or of a regression,
whose records differ more than texts do."""

_SMALLEST_VOCABULARY, _LARGEST_VOCABULARY = 256, 262_144
"""Bytes, and Gemma's: between these lies the vocabulary of a language model that is not known."""

_OTHER_UNIT = 4.0
"""Times what a guess gives. Losses beyond are summed over tokens, or no cross-entropy at all."""

_NO_START = 8.0
"""Times what a guess gives. No base is so sure of wrong tokens (a hundred nats): a run that begins there, and has come
down, is a regression."""

_FALLS = -3.0
"""z of the trend of a run that learns in all its noise: one in 700 by chance."""

_EVAL_SWINGS, _EVAL_FACTOR, _EVAL_NOISE = 2, 2.0, 0.2
"""Evaluations on a handful of drawn records differ by half at most; batches of one record have a noise of 0.2 at a
loss of 1."""


@rule("LORA345", severity="warning", needs=HistoryFacts)
def loss_oscillates(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss swings up and down instead of falling.

    ## What it does
    Looks for one of these shapes: three or more swings by 30 % of the starting loss; one excursion to 1.3 times
    the start that lasts longer than one loss and is taken back; a strict up and down from loss to loss by
    a quarter of its level, which is not that of a few batches that come in turn; evaluation losses that double and
    halve again twice, beside training losses as loud; or noise that no batch explains, in a run which does not
    learn: no lower than it began, or about at the loss of a guess, ln(vocabulary), or above. Each must
    stand out of the noise of the curve, and an excursion of what a running mean of noise strays by. A bump where the
    schedule starts anew is none, and after a third of the losses an excursion by one jump may be new data (info).
    `benchmarks/history_diagnosis.py` measures how often this errs.

    ## Why is this bad?
    The steps are larger than the valley is wide: the learning rate, or the adapter's scaling, is too high.
    What comes out is worse than what smaller steps give, and the next swing may be the one that diverges.

    ## Example
    ```python
    report = diagnose_history([2.1, 1.7, 1.9, 6.4, 7.2, 5.8, 4.1, 2.9, 2.3, 2.0, 1.9, 1.8], learning_rate=3e-3)
    ```

    ## Use instead
    ```python
    report = diagnose_history([2.1, 1.9, 1.8, 1.7, 1.6, 1.6, 1.5, 1.4, 1.4, 1.3, 1.3, 1.3], learning_rate=1e-3)
    ```

    ## References
    - Edge of stability: https://arxiv.org/abs/2103.00065
    """
    curve = facts.curve
    if curve is None or max(curve.start.value, curve.peak) < FITS or facts.repetition:
        return
    observed = (
        _excursion(facts, curve)
        or _swinging(facts, curve)
        or _alternating(facts, curve)
        or _loud(facts, curve)
        or _evals_swing(facts, curve)
    )
    if observed:
        yield Violation(
            where="train_losses",
            observed=observed,
            expected="a loss that falls but for the noise of its batches",
            fix=f"{lower_rate(facts.learning_rate, 3)}, with warm-up over the first 5 % of the steps and "
            "gradients clipped at 1.0",
            severity="info" if curve.may_have_met_other_data and curve.swings < _SWINGS else None,
        )


def _excursion(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    start, height = curve.start, curve.peak - curve.start.value
    # The first three losses may be low by chance, an evaluation beside them is not.
    at_start = (one.loss for one in facts.evals if one.step <= facts.step(start.count - 1))
    usual = max(start.value, *at_start, 0.0)
    high = [one.loss > _OVERSHOOT * usual for one in facts.evals]
    evaluated = any(high) and not high[-1]
    if (
        curve.peak < _OVERSHOOT * start.value
        or height < (_CLEAR_EVALUATED if evaluated else _CLEAR) * curve.noise
    ):
        return None
    if curve.peak - curve.end.value < _TAKEN_BACK * height or height < STRAYS * wander(facts.usable, 0):
        return None
    lead = max(1, len(facts.usable) // 10)
    if any(curve.peak_at - lead <= restart <= curve.peak_at for restart in facts.restarts):
        return None
    return (
        f"the loss began at {start.value:.4g}, shot up to {curve.peak:.4g} at step {facts.step(curve.peak_at)} "
        f"and came back to {curve.end.value:.4g}"
    )


def _swinging(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    if curve.swings - len(facts.restarts) < _SWINGS:
        return None
    return f"the loss rose widely and fell again {curve.swings} times"


def _alternating(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    enough = len(facts.usable) >= _FEWEST_ALTERNATING and curve.end.value > FITS
    if not enough or curve.cycles or curve.alternation < _ALTERNATION or curve.deviation < _WIDTH:
        return None
    return f"the loss goes up and down by {curve.deviation:.0%} from step to step"


def _loud(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    """Noise that no batch explains, in a run that does not learn."""
    size, power = _ONE_RECORD
    level = curve.middle
    if len(facts.usable) < _FEWEST_LOUD or curve.cycles or level < FITS or facts.evals_are_flat:
        return None
    limit = _noise_limit(facts, curve)
    times = curve.deviation / (size * level**power)
    if limit is None or times < limit:
        return None
    return (
        f"the loss began at {curve.start.value:.4g}, stays at about {level:.4g} and scatters by "
        f"{curve.deviation:.0%} of it, {times:.2g} times as much as batches of one record do"
    )


def _noise_limit(facts: HistoryFacts, curve: CurveFacts) -> float | None:
    """How many times the noise of one record a run may have; None where it learns, or its loss is in another unit."""
    level = curve.middle
    least = facts.chance or math.log(_SMALLEST_VOCABULARY)
    most = facts.chance or math.log(_LARGEST_VOCABULARY)
    falls = curve.later_trend < _FALLS
    if level > _OTHER_UNIT * most or (facts.chance is None and curve.start.value > _NO_START * most):
        return None
    if level > most and not falls:
        return _LOUD_ABOVE_CHANCE
    if level > max(_WITHOUT_GAIN, curve.start.value):
        return _LOUD_WITHOUT_GAIN
    return _LOUD if level > _ABOUT_CHANCE * least and not falls else None


def _evals_swing(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    losses = [one.loss for one in facts.evals if one.loss > 0]
    if len(losses) < len(facts.evals) or len(losses) < 2 * _EVAL_SWINGS or curve.deviation < _EVAL_NOISE:
        return None
    times = swings([math.log(loss) for loss in losses], math.log(_EVAL_FACTOR))
    if times < _EVAL_SWINGS or max(losses) < FITS:
        return None
    between = f"{min(losses):.4g} and {max(losses):.4g}"
    return f"the evaluation loss doubled and halved again {times} times, between {between}"
