from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.curve import Fall
from pytest_lora.facts.history import FITS, CurveFacts, HistoryFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import double_rank

_FEWEST = 20
_FALL = 0.03
_RESOLUTION = 0.017
_FALL_NOISE, _EARLY_NOISE, _EARLY = 2.5, 3.0, 10
_BAND, _BAND_NOISE = 0.1, 5.0
_SHARE_WEAK, _SHARE = 0.1, 0.15
_STEPS_WEAK, _STEPS = 50, 100


@rule("LORA344", severity="warning", needs=HistoryFacts)
def loss_stays_on_a_plateau(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss does not fall.

    ## What it does
    Looks for a curve whose losses, split anywhere, are on average less than 3 % lower after the split than
    before. The verdict needs 20 losses, 15 % of `total_steps` (10 %, by when the longest usual warm-up is over:
    info) or, where that is not known, 100 steps (50: info), and so little noise that such a fall could have
    been seen. A loss below 0.1 has nowhere to fall to.
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
    if curve is None or len(facts.usable) < _FEWEST or facts.repetition or not _flat(curve):
        return
    share = facts.share_seen
    seen, weak, enough = (facts.steps, _STEPS_WEAK, _STEPS) if share is None else (share, _SHARE_WEAK, _SHARE)
    if seen < weak:
        return
    of_the_run = "" if share is None else f", {share:.0%} of the run"
    yield Violation(
        where="train_losses",
        observed=f"the loss began at {curve.start.value:.4g} and is {curve.end.value:.4g} after {facts.steps} "
        f"steps{of_the_run}; "
        f"it has not fallen by {_FALL:.0%}",
        expected="a clear fall within the first 10 to 20 % of the run",
        fix=f"stop, load the base anew, {double_rank(expect)}, and start from epoch 0: never resume a checkpoint "
        "with another rank. If a higher rank changes nothing, raise the learning rate",
        severity="info" if seen < enough else None,
    )


def _flat(curve: CurveFacts) -> bool:
    level = curve.start.value
    spread = curve.highest.value - curve.lowest.value
    narrow = spread < _BAND * level or curve.highest.above(curve.lowest) < _BAND_NOISE
    return min(level, curve.end.value) > FITS and narrow and _too_little(curve.fall, level)


def _too_little(fall: Fall, level: float) -> bool:
    could_be_seen = fall.resolution < _RESOLUTION * level
    # Among several splits the early ones, with few losses before them, look like a fall by chance.
    noise = (_EARLY_NOISE if fall.at < _EARLY else _FALL_NOISE) * fall.error
    return could_be_seen and fall.size < max(_FALL * level, noise)
