from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.history import FITS, CurveFacts, HistoryFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import lower_rate

_SWINGS = 3
_OVERSHOOT = 1.3
_TAKEN_BACK = 0.5
_CLEAR = 6.0
_ALTERNATION = 0.7
_WIDTH = 0.25
_FEWEST_ALTERNATING = 20


@rule("LORA345", severity="warning", needs=HistoryFacts)
def loss_oscillates(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss swings up and down instead of falling.

    ## What it does
    Looks for one of three shapes: three or more swings by 30 % of the starting loss; one excursion to 1.3 times
    the start that lasts longer than one loss and is taken back; or a strict up and down from loss to loss by
    a quarter of its level, which is not that of a few batches that come in turn. Each must stand out of the
    noise of the curve. `benchmarks/history_diagnosis.py` measures how often this errs.

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
    observed = _excursion(facts, curve) or _swinging(curve) or _alternating(facts, curve)
    if observed:
        yield Violation(
            where="train_losses",
            observed=observed,
            expected="a loss that falls but for the noise of its batches",
            fix=f"{lower_rate(facts.learning_rate, 3)}, with warm-up over the first 5 % of the steps and "
            "gradients clipped at 1.0",
        )


def _excursion(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    start, height = curve.start, curve.peak - curve.start.value
    if curve.peak < _OVERSHOOT * start.value or height < _CLEAR * curve.noise:
        return None
    if curve.peak - curve.end.value < _TAKEN_BACK * height:
        return None
    return (
        f"the loss began at {start.value:.4g}, shot up to {curve.peak:.4g} at step {facts.step(curve.peak_at)} "
        f"and came back to {curve.end.value:.4g}"
    )


def _swinging(curve: CurveFacts) -> str | None:
    return f"the loss rose widely and fell again {curve.swings} times" if curve.swings >= _SWINGS else None


def _alternating(facts: HistoryFacts, curve: CurveFacts) -> str | None:
    enough = len(facts.usable) >= _FEWEST_ALTERNATING and curve.end.value > FITS
    if not enough or curve.cycles or curve.alternation < _ALTERNATION or curve.deviation < _WIDTH:
        return None
    return f"the loss goes up and down by {curve.deviation:.0%} from step to step"
