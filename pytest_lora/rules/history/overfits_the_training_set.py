from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.curve import noise, trend
from pytest_lora.facts.history import EvalLoss, HistoryFacts
from pytest_lora.rules import Violation, rule

_FEWEST, _ENOUGH = 3, 4
"""A best evaluation and two after it; with one more there is a trend to speak of."""

_RISE, _RISE_WEAK, _RISE_OF_FEW = 0.05, 0.02, 0.2
"""In ``benchmarks/results/history_runs.json`` runs on many records end at their best evaluation, those that
overfit 28 % and more above; with three evaluations one of them is most of the evidence."""

_RISES = 3.5
"""z of a rank test over the evaluations since the best: they climb one after the other; one in 4,000 by chance."""

_TRAIN_FELL = 0.05
_LEARNED_BY_HEART = 0.5
"""A training loss of half the evaluation loss is a probability per token of its square root: the examples are known."""

_CLEAR = 3.0
"""Standard deviations of the noise; the usual three."""

_ENOUGH_FOR_NOISE = 4
"""Losses from which two second differences can be taken."""


@rule("LORA346", severity="warning", needs=HistoryFacts)
def overfits_the_training_set(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The evaluation loss rises while the training loss falls on.

    ## What it does
    Looks for a best evaluation with two or more after it, the last two of them worse by 5 % (2 % where a rank test
    shows that all of them climb, else info; with only three evaluations 20 %, and info), while the training loss fell
    by another 5 % since the best, or has not risen and is below half of the evaluation loss, and made no jump that
    other data explain. `benchmarks/history_diagnosis.py` measures how often this errs.

    ## Why is this bad?
    The adapter has begun to learn its training examples by heart. Every further step makes it worse on all
    others.

    ## Example
    ```python
    report = diagnose_history([2.0 * 0.93**i for i in range(60)], eval_losses=[1.6, 1.3, 1.2, 1.4, 1.7, 2.1])
    ```

    ## Use instead
    ```python
    report = diagnose_history([2.0 * 0.99**i for i in range(60)], eval_losses=[1.9, 1.7, 1.6, 1.5, 1.4, 1.4])
    ```

    ## References
    - Early stopping: https://huggingface.co/docs/transformers/main_classes/callback
    """
    if len(facts.evals) < _FEWEST:
        return
    best = min(facts.evals, key=lambda one: one.loss)
    later = [one for one in facts.evals if one.step > best.step]
    if len(later) < 2 or best.loss <= 0:
        return
    rise = min(one.loss for one in later[-2:]) / best.loss - 1
    few = len(facts.evals) < _ENOUGH
    if (
        rise < (_RISE_OF_FEW if few else _RISE_WEAK)
        or not _clear([best, *later], best.loss * rise)
        or not _trains_on(facts, best)
        or _on_other_data(facts, best)
    ):
        return
    last = facts.evals[-1]
    slight = rise < _RISE and trend([one.loss for one in (best, *later)]) < _RISES
    yield Violation(
        where="eval_losses",
        observed=f"the evaluation loss was {best.loss:.4g} at step {best.step} and is {last.loss:.4g} at step "
        f"{last.step}, while the training loss fell to {facts.train_at(last.step):.4g}",
        expected="an evaluation loss that falls with the training loss, or a run that stops at its best",
        fix=f"keep the checkpoint of step {best.step} (load_best_model_at_end=True), lower the rank to 4-8, set "
        "lora_dropout to 0.1-0.2 and weight_decay to 0.01-0.1, or train on more data for fewer epochs",
        severity="info" if few or slight else None,
    )


def _clear(since_best: list[EvalLoss], rise: float) -> bool:
    losses = [one.loss for one in since_best]
    return len(losses) < _ENOUGH_FOR_NOISE or rise > _CLEAR * noise(losses)


def _trains_on(facts: HistoryFacts, best: EvalLoss) -> bool:
    last = facts.evals[-1]
    then, now = facts.train_at(best.step), facts.train_at(last.step)
    if then is None or now is None:
        return False
    before, after = facts.level_at(best.step), facts.level_at(last.step)
    if before is None or after is None:
        return now < (1 - _TRAIN_FELL) * then
    falls = before.above(after) > _CLEAR and now < (1 - _TRAIN_FELL) * then
    return falls or (now < _LEARNED_BY_HEART * last.loss and after.above(before) < _CLEAR)


def _on_other_data(facts: HistoryFacts, best: EvalLoss) -> bool:
    """Whether the training loss jumped since the evaluation before the best, as it does where the data change."""
    curve = facts.curve
    if curve is None or curve.jump is None or not curve.may_have_met_other_data:
        return False
    before = max((one.step for one in facts.evals if one.step < best.step), default=0)
    return facts.step(curve.jump.at) > before
