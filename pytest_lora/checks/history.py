"""The losses that a run has logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pytest_lora.arguments import refusing, require_expect
from pytest_lora.checks.judging import report_on
from pytest_lora.expect import Expect
from pytest_lora.facts.history import HistoryFacts, history_facts
from pytest_lora.facts.measures import history_curve
from pytest_lora.findings import Report
from pytest_lora.rules.selection import codes


@refusing
def diagnose_history(
    train_losses: Iterable[float],
    eval_losses: Iterable[float] | Mapping[int, float] | None = None,
    *,
    total_steps: int | None = None,
    steps_per_loss: int = 1,
    learning_rate: float | Sequence[float] | None = None,
    vocabulary_size: int | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge the losses that a run has logged so far, and say what a practitioner would do.

    Nothing is run: this is about numbers from a log. Too little evidence is silence, not a guess.

    Args:
        train_losses: Training losses in their order, one or more, in nats per token or alike; from a
            ``Trainer``: ``[x["loss"] for x in trainer.state.log_history if "loss" in x]``. Below ten losses
            only what they show beyond doubt is judged.
        eval_losses: Losses on held-out data: a mapping from optimizer step to loss, or a list, which is
            taken as evenly spaced over the training losses.
        total_steps: Optimizer steps that the run is planned to have, at least 1. A plateau is then judged by
            the share of the run that has passed.
        steps_per_loss: Optimizer steps from one training loss to the next (the Trainer's ``logging_steps``).
        learning_rate: The peak learning rate, or one rate for each training loss. Advice then says from which to
            which; with the rate of each loss, warm-up and restarts of the schedule are not taken for faults.
        vocabulary_size: How many answers the loss chooses among, at least 2: tokens, or classes of a classifier. Losses
            are then compared with ln(vocabulary_size), that of a guess.
        expect: What is meant; with ``expect.config`` advice on the rank says from which to which.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report with the rules on a history (codes LORA340 to LORA359).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are no training losses, a number is outside its range, or a code does not exist.
    """
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    facts = history_facts(
        train_losses,
        eval_losses,
        total_steps=total_steps,
        steps_per_loss=steps_per_loss,
        learning_rate=learning_rate,
        vocabulary_size=vocabulary_size,
    )
    return judge_history(facts, expect, select, ignore)


def judge_history(
    facts: HistoryFacts, expect: Expect, select: Iterable[str] = (), ignore: Iterable[str] = ()
) -> Report:
    """The report on a history; see ``diagnose_history``."""
    count = len(facts.train)
    subject = f"history of {count} training loss{'es' if count > 1 else ''}"
    return report_on(subject, [facts], expect, select, ignore, (history_curve(subject, facts),))
