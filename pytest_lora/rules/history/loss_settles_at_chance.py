from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.curve import trend
from pytest_lora.facts.curve_shape import CurveFacts
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import lower_rate

_FEWEST = 20
"""From so many losses on the second half has a trend of its own."""

_AT_CHANCE = (0.97, 1.1)
"""Shares of ln(vocabulary). Above lies what Adam's noise adds to a guess: real classifiers on random labels
settle 0 to 7 % above. A classifier that has learned anything goes on falling through this band."""

_TOKENS, _UNLEARNED = 64, 0.8
"""Characters are the smallest vocabulary of a language model. How often tokens come alone brings its loss below a
guess, by 5 to 13 % in real runs at far too high a rate; from 0.8 of a guess on it is as good as none, as in LORA304."""

_SETTLED = 0.05
"""Share by which the second half of a run may fall and count as settled: such runs fall by 1 to 4 %, those that learn
on by 17 % and more."""

_CAME_DOWN = 1.1
"""A loss above that of a guess has fallen by a tenth where the run learned at all: else it is a plateau (LORA344)."""

_SETTLES, _STAYS_ABOVE = "no longer falls", "stays above a guess if it falls by as much again"

_PRINT = (
    "print a few training examples as the model sees them, input and label side by side: see that each label "
    "belongs to its input, and that truncation leaves what the answer depends on"
)

_ANOTHER_UNIT = (
    "see whether the loss is logged as a mean over tokens: divide it by the micro-batches of an accumulation, over "
    "which transformers 4.46 logged a sum. If it is a mean, the token ids belong to another tokenizer: compare "
    "len(tokenizer) with model.config.vocab_size, and decode a batch"
)

_FALLS = -3.0
"""z of the trend of losses that fall: one in 700 by chance."""

_SHARE, _STEPS = 0.5, 100
"""Before half of a run, or 100 steps of one of unknown length, a loss may still be on its way through."""


@rule("LORA347", severity="warning", needs=HistoryFacts)
def loss_settles_at_chance(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss came down to that of a guess, or to above it, and stays there.

    ## What it does
    Compares the level of the last losses with ln(`vocabulary_size`), where that is given. At 97 to 110 % of it, after
    a fall and with none over the second half of the losses, nothing was learned but how often each answer comes. Of 64
    answers and more it is so from 80 % on, where the second half of the losses falls by less than 5 % or the evaluation
    losses lie within 2 % of each other. Above 110 % a loss that fell by a tenth is told where a fall as large as that
    of the second half would leave it there. The verdict needs 20 losses and half of `total_steps`, or 100 steps where
    that is not known.

    ## Why is this bad?
    The loss fell, and so looks right: a model that had opinions has unlearned them. But its answers do not depend on
    its inputs. The labels belong to other inputs (shuffled, or sorted apart from them), what the answer depends on
    is cut off, or the learning rate is far too high. No mean over tokens stays above a guess: the loss is logged as a
    sum, or the tokens are not those of the base.

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
    - https://github.com/huggingface/transformers/issues/35204
    """
    curve, chance = facts.curve, facts.chance
    if curve is None or chance is None or len(facts.usable) < _FEWEST or facts.repetition:
        return
    share = facts.share_seen
    if (facts.steps_trained < _STEPS) if share is None else (share < _SHARE):
        return
    found = _found(facts, curve, chance)
    if found is None:
        return
    falls, fix = found
    yield Violation(
        where="train_losses",
        observed=f"the loss is {curve.end.value:.4g} after {facts.steps} steps and {falls}; a guess among "
        f"{facts.vocabulary_size:,} answers gives {chance:.4g}",
        expected="a loss below that of a guess",
        fix=fix,
    )


def _found(facts: HistoryFacts, curve: CurveFacts, chance: float) -> tuple[str, str] | None:
    """How it falls, and the remedy."""
    least, most = _AT_CHANCE
    end, second_half = curve.end.value, facts.usable[len(facts.usable) // 2 :]
    halfway = curve.levels[len(curve.levels) // 2].value
    settled = end > (1 - _SETTLED) * halfway
    if end >= most * chance:
        stays = end - (halfway - end) > most * chance
        return (_STAYS_ABOVE, _ANOTHER_UNIT) if stays and curve.start.value > _CAME_DOWN * end else None
    tokens = facts.vocabulary_size is not None and facts.vocabulary_size >= _TOKENS
    if tokens and min(curve.lowest.value, end) > _UNLEARNED * chance and (facts.evals_are_flat or settled):
        return (
            _SETTLES,
            f"load the adapter anew and {lower_rate(facts.learning_rate, 10)}: steps that are far too large "
            f"leave of a language model how often each token comes. If that changes nothing, {_PRINT}",
        )
    # A loss that comes down by chance alone has no trend; one that learns has it to the end.
    if end <= least * chance or curve.trend >= _FALLS or trend(second_half) < _FALLS:
        return None
    return _SETTLES, _PRINT
