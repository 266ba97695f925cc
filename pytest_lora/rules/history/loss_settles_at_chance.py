from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.curve import trend
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule

_FEWEST = 20
"""From so many losses on the second half has a trend of its own."""

_AT_CHANCE = (0.97, 1.1)
"""Shares of ln(vocabulary). Above lies what Adam's noise adds to a guess: real classifiers on random labels
settle 0 to 7 % above. A classifier that has learned anything goes on falling through this band."""

_TOKENS, _UNLEARNED = 256, 0.8
"""Bytes are the smallest vocabulary of a language model. How often tokens come alone brings its loss below a guess, by
some percent on real runs at far too high a rate; from 0.8 of a guess on it is as good as none, as in LORA304."""

_FALLS = -3.0
"""z of the trend of losses that fall: one in 700 by chance."""

_SHARE, _STEPS = 0.5, 100
"""Before half of a run, or 100 steps of one of unknown length, a loss may still be on its way through."""


@rule("LORA347", severity="warning", needs=HistoryFacts)
def loss_settles_at_chance(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss came down to that of a guess and stays there.

    ## What it does
    Compares the level of the last losses with ln(`vocabulary_size`), where that is given. At 97 to 110 % of it (from
    80 % on for 256 tokens and more, where the evaluation losses lie within 2 % of each other), after
    a fall and with none over the second half of the losses, nothing was learned but how often each answer comes. The
    verdict needs 20 losses and half of `total_steps`, or 100 steps where that is not known.

    ## Why is this bad?
    The loss fell, and so looks right: a model that had opinions has unlearned them. But its answers do not depend on
    its inputs. The labels belong to other inputs (shuffled, or sorted apart from them), or what the answer depends on
    is cut off.

    ## Example
    ```python
    losses = [1.3863 + 1.5 * 0.8**i + (37 * i * i % 101) / 2000 for i in range(120)]
    report = diagnose_history(losses, vocabulary_size=4)
    ```

    ## Use instead
    ```python
    losses = [0.3 + 2.5 * 0.97**i + (37 * i * i % 101) / 2000 for i in range(120)]
    report = diagnose_history(losses, vocabulary_size=4)
    ```

    ## References
    - https://karpathy.github.io/2019/04/25/recipe/
    """
    curve, chance = facts.curve, facts.chance
    if curve is None or chance is None or len(facts.usable) < _FEWEST or facts.repetition:
        return
    share = facts.share_seen
    if (facts.steps_trained < _STEPS) if share is None else (share < _SHARE):
        return
    least, most = _AT_CHANCE
    unlearned = (
        facts.evals_are_flat and facts.vocabulary_size is not None and facts.vocabulary_size >= _TOKENS
    )
    if unlearned:
        least = _UNLEARNED
    end, second_half = curve.end.value, facts.usable[len(facts.usable) // 2 :]
    # At far too high a rate the fall is over within a few losses, of which a trend over all shows nothing.
    came_down = unlearned or curve.trend < _FALLS
    if not came_down or not least * chance < end < most * chance or trend(second_half) < _FALLS:
        return
    yield Violation(
        where="train_losses",
        observed=f"the loss is {end:.4g} after {facts.steps} steps and no longer falls; a guess among "
        f"{facts.vocabulary_size:,} answers gives {chance:.4g}",
        expected="a loss below that of a guess",
        fix="print a few training examples as the model sees them, input and label side by side: see that each label "
        "belongs to its input, and that truncation leaves what the answer depends on",
    )
