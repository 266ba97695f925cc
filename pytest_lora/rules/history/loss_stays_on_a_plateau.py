from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from pytest_lora.expect import Expect
from pytest_lora.facts.curve import Fall
from pytest_lora.facts.curve_shape import FITS, CurveFacts
from pytest_lora.facts.history import EVAL_FLAT, HistoryFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import next_rank

_FEWEST = 20
"""From so many losses on there are six levels and more."""

_FALL = 0.03
"""The least that a run which learns falls by: the healthy ones of ``benchmarks/results/history_runs.json`` have
fallen by 15 % and more after a fifth of their steps."""

_RESOLUTION = 0.017
"""Standard error at which a fall of 3 % is just under two of them."""

_FALL_NOISE, _EARLY_NOISE, _EARLY = 2.5, 3.0, 10
"""Standard errors. The clearest of six splits of white noise lies 1.0 of them off in the mean, and 3.2 once in
a hundred; the mean of a few first losses has longer tails."""

_BAND, _BAND_NOISE = 0.1, 5.0
"""A curve within a tenth of its start has no shape; else its highest and lowest of 20 levels may differ by
chance, by 3.7 standard errors of one level in the mean."""

_SHARE_WEAK, _SHARE = 0.1, 0.15
_STEPS_WEAK, _STEPS = 50, 100
"""By a tenth of a run the longest usual warm-up is over (``warmup_ratio`` is 0.03 to 0.1); where the length of
the run is not known, 100 steps are a tenth of a run of a thousand."""

_NO_BETTER, _LATER_EVALS, _EARLY_BEST = 1.05, 5, 1 / 3
_ALL_WORSE = 1.02
"""After a best evaluation so early, five later ones which are all worse, by 5 % in the middle, are no wobble."""

_LONGEST_WARM_UP = 0.5
"""Share of a run. A warm-up beyond it leaves no time at the rate that was set; LORA329 tells one over the whole run."""

_DRAWN_BELOW, _DRAWN_NOISE = 0.5, 0.25
"""A loss, and its scatter as a share of it. Diffusion models predict noise at drawn steps: their squared errors of 0.05
to 0.5 scatter by 30 to 75 % and hardly fall in runs that learn (reports on SD 1.5, LTX-Video and Wan)."""

_MOVES_NOTHING = 1e-7
"""Below this rate ten thousand Adam steps move a number by less than 1e-3, whatever the rank (LORA305)."""

_FELL = -3.0
"""z of the trend of training losses that fall: one in 700 by chance."""


@rule("LORA344", severity="warning", needs=HistoryFacts)
def loss_stays_on_a_plateau(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss does not fall.

    ## What it does
    Looks for a curve whose losses, split anywhere, are on average less than 3 % lower after the split than
    before, with so little noise that such a fall could have been seen; or whose evaluation losses moved by less than
    2 % while a rank test sees no fall of the training losses; or whose evaluation losses are all worse than one in the
    first third of the run, while the training loss has not fallen since. The verdict needs 20 losses, 15 % of
    `total_steps` (10 %, by when the longest usual warm-up is over: info) or, where that is not known, 100 steps (50:
    info). Steps at less than a tenth of the peak rate do not count, and while a schedule still warms up
    it is an info, up to half of the run. So it is below 0.5 where the losses scatter by a quarter, as those of
    diffusion models do, and none was evaluated. A loss below 0.1 has nowhere to fall to.
    `benchmarks/history_diagnosis.py` measures how often this errs.

    ## Why is this bad?
    What a healthy adapter learns, it mostly learns early. One that shows nothing after the first 10 to 20 % of
    the run will not make it up later: its rank is too low for the task, or its learning rate for its scaling.

    ## Example
    ```python
    report = diagnose_history([2.0 + (37 * i * i % 101) / 1000 for i in range(60)], total_steps=300)
    ```

    ## Use instead
    ```python
    report = diagnose_history([2.0 * 0.99**i + (37 * i * i % 101) / 1000 for i in range(60)], total_steps=300)
    ```

    ## References
    - LoRA Without Regret: https://thinkingmachines.ai/blog/lora/
    """
    curve = facts.curve
    if curve is None or len(facts.usable) < _FEWEST or facts.repetition:
        return
    observed = _found(facts, curve)
    share = facts.share_seen
    seen, weak, enough = (
        (facts.steps_trained, _STEPS_WEAK, _STEPS) if share is None else (share, _SHARE_WEAK, _SHARE)
    )
    if observed is None or seen < weak:
        return
    of_the_run = "" if share is None else f", {share:.0%} of the run"
    yield Violation(
        where="train_losses",
        observed=f"{observed} after {facts.steps} steps{of_the_run}",
        expected="a clear fall within the first 10 to 20 % of the run",
        fix=_fix(facts, expect),
        severity="info" if seen < enough or _is_to_come(facts) or _may_be_drawn(facts, curve) else None,
    )


def _fix(facts: HistoryFacts, expect: Expect) -> str:
    if facts.learning_rate is not None and 0 < facts.learning_rate < _MOVES_NOTHING:
        return (
            f"raise the learning rate, which was {facts.learning_rate:.2g} at most: look whether the schedule is "
            "stepped at every optimizer step (interval='step' in Lightning), and whether its warm-up is counted in them"
        )
    return (
        f"stop, load the base anew, {next_rank(expect, facts.learning_rate)}, and start from step 0, which costs "
        f"{_cost(facts)}: never resume a checkpoint with another rank. If a higher rank changes nothing, raise the "
        "learning rate"
    )


def _cost(facts: HistoryFacts) -> str:
    """What starting again costs: the steps that are lost, and their share of the plan."""
    lost = f"the {facts.steps:,} steps so far"
    if facts.total_steps is None:
        return f"{lost}, and twice the adapter and its optimizer states"
    again = (
        f"{lost} and all {facts.total_steps:,} anew, {facts.steps / facts.total_steps:.0%} more than planned"
    )
    return f"{again}, and twice the adapter and its optimizer states"


def _is_to_come(facts: HistoryFacts) -> bool:
    """Whether the rates that are to teach are still ahead, in a warm-up that is no longer than it may be."""
    return facts.is_warming_up and (facts.share_seen or 0.0) < _LONGEST_WARM_UP


def _may_be_drawn(facts: HistoryFacts, curve: CurveFacts) -> bool:
    """Whether the loss may be one of drawn noise, of which only an evaluation at fixed steps shows anything."""
    return not facts.evals and curve.middle < _DRAWN_BELOW and curve.deviation > _DRAWN_NOISE


def _found(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    start, end = curve.start.value, curve.end.value
    if min(start, end) < FITS:
        return None
    if _flat(curve):
        return f"the loss began at {start:.4g} and has not fallen by {_FALL:.0%}: it is {end:.4g}"
    if facts.evals_are_flat and curve.trend > _FELL and _too_little(curve.fall, start):
        first, last = facts.evals[0].loss, facts.evals[-1].loss
        return f"the evaluation loss moved by less than {EVAL_FLAT:.0%}, from {first:.4g} to {last:.4g}"
    return _no_better(facts, curve)


def _no_better(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    """A run that got where it is early, and only worse from there, in training and in evaluation."""
    best = min(facts.evals, key=lambda one: one.loss, default=None)
    rises = curve.trend > -_FELL
    if best is None or best.loss < FITS or best.step > _EARLY_BEST * facts.steps or rises:
        return None
    later = [one.loss for one in facts.evals if one.step > best.step]
    known = facts.level_at(best.step)
    if len(later) < _LATER_EVALS or known is None or known.value > _NO_BETTER * curve.end.value:
        return None
    if min(later) < _ALL_WORSE * best.loss or median(later) < _NO_BETTER * best.loss:
        return None
    return (
        f"the evaluation loss was {best.loss:.4g} at step {best.step} and never again as low, and the training loss "
        f"has not fallen either: from {known.value:.4g} there to {curve.end.value:.4g}"
    )


def _flat(curve: CurveFacts) -> bool:
    level = curve.start.value
    spread = curve.highest.value - curve.lowest.value
    narrow = spread < _BAND * level or curve.highest.above(curve.lowest) < _BAND_NOISE
    # The first three losses may be low by chance; where the curve is flat its middle says better how high it is.
    could_be_seen = curve.fall.resolution < _RESOLUTION * max(level, curve.middle)
    return narrow and could_be_seen and _too_little(curve.fall, level)


def _too_little(fall: Fall, level: float) -> bool:
    # Among several splits the early ones, with few losses before them, look like a fall by chance.
    noise = (_EARLY_NOISE if fall.at < _EARLY else _FALL_NOISE) * fall.error
    return fall.size < max(_FALL * level, noise)
