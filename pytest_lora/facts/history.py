"""Facts about the losses that a run has logged so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise, takewhile
from operator import index
from typing import Any

from pytest_lora.facts.curve import Level, repetition
from pytest_lora.facts.curve_shape import FEWEST_LOSSES, CurveFacts, curve_facts
from pytest_lora.values import MOST_LOSSES, require_items, require_whole, shown

NO_RATE = 0.1
"""Below this share of its peak a schedule is still at the start of its warm-up, or about to end: the last tenth of a
linear decay and the last fifth of a cosine move the weights by 1 % and 2 % of what the whole schedule does."""

FEWEST_EVALS, EVAL_FLAT = 3, 0.02
"""Evaluations on the same records have no noise of batches: 2 % is less than half of what a slow run falls by."""

RESTART = 2.0
"""A schedule that doubles its rate between two losses has started anew; every warm-up that follows a decay does."""


@dataclass(frozen=True, slots=True)
class EvalLoss:
    """A loss on held-out data, and the optimizer steps that were done before it."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class HistoryFacts:
    """The losses that a run has logged so far.

    Attributes:
        train: All training losses as given.
        evals: Losses on held-out data, in order of their steps.
        steps_per_loss: Optimizer steps from one training loss to the next.
        total_steps: Optimizer steps that the run is planned to have, if known.
        learning_rate: The peak learning rate, if known.
        rates: The learning rate at each training loss; empty where only the peak or nothing is known.
        vocabulary_size: How many answers the loss chooses among, if known: tokens, or classes of a classifier.
        nonfinite: Indices of training losses that are NaN or infinite.
        nonfinite_evals: Steps of evaluations whose loss is NaN or infinite.
        zero_from: Index from which on every training loss is exactly zero, if two or more are.
        zero_has_gradient: Whether a loss of zero was seen to leave a gradient, as that of a policy gradient does.
        usable: Training losses before the first that is not finite and before ``zero_from``.
        repetition: Period after which the usable losses come again to the last digit, 1 if all are equal.
        curve: Statistics of the usable losses; None where they are too few, or some are negative, so that no
            share of a loss means anything.
    """

    train: tuple[float, ...]
    evals: tuple[EvalLoss, ...]
    steps_per_loss: int
    total_steps: int | None
    learning_rate: float | None
    rates: tuple[float, ...]
    vocabulary_size: int | None
    nonfinite: tuple[int, ...]
    nonfinite_evals: tuple[int, ...]
    zero_from: int | None
    zero_has_gradient: bool
    usable: tuple[float, ...]
    repetition: int | None
    curve: CurveFacts | None

    def step(self, index: int) -> int:
        """Optimizer steps done when the training loss of this index was logged."""
        return (index + 1) * self.steps_per_loss

    @property
    def steps(self) -> int:
        """Optimizer steps that the usable losses cover."""
        return len(self.usable) * self.steps_per_loss

    @property
    def share_seen(self) -> float | None:
        """Share of the planned run that the usable losses cover."""
        return None if self.total_steps is None else self.steps / self.total_steps

    @property
    def evals_are_flat(self) -> bool:
        """Whether three or more evaluation losses lie within ``EVAL_FLAT`` of the first."""
        losses = [one.loss for one in self.evals]
        return len(losses) >= FEWEST_EVALS and max(losses) - min(losses) < EVAL_FLAT * losses[0]

    @property
    def chance(self) -> float | None:
        """The loss of a guess, ln(vocabulary), in nats; None where the vocabulary is not known."""
        return math.log(self.vocabulary_size) if self.vocabulary_size else None

    @property
    def restarts(self) -> tuple[int, ...]:
        """Indices of training losses from which on the schedule raised the learning rate again, after its warm-up."""
        falls = (i for i, (before, after) in enumerate(pairwise(self.rates)) if after < before)
        warm = next(falls, len(self.rates))
        steps = enumerate(pairwise(self.rates), start=1)
        return tuple(i for i, (before, after) in steps if i > warm and after > RESTART * before)

    @property
    def is_warming_up(self) -> bool:
        """Whether the schedule has raised the rate up to now, so that its peak is still to come."""
        return bool(self.rates) and self.rates[-1] == max(self.rates) > self.rates[len(self.rates) // 2]

    @property
    def steps_trained(self) -> int:
        """Optimizer steps of the usable losses, but for those of a schedule that had next to no learning rate."""
        if not self.rates or not self.learning_rate:
            return self.steps
        least = NO_RATE * self.learning_rate
        return self.steps_per_loss * sum(rate >= least for rate in self.rates[: len(self.usable)])

    def level_at(self, step: int) -> Level | None:
        """The level of the training loss around a step; None where there are too few losses for levels."""
        if self.curve is None:
            return None
        index = step / self.steps_per_loss - 1
        return min(self.curve.levels, key=lambda known: abs(known.middle - index))

    def train_at(self, step: int) -> float | None:
        """The training loss around a step, of several losses where there are enough; None if there is none."""
        if known := self.level_at(step):
            return known.value
        index = max(0, min(len(self.usable), round(step / self.steps_per_loss)) - 1)
        return self.usable[index] if self.usable else None


def history_facts(
    train_losses: Iterable[float],
    eval_losses: Iterable[float] | Mapping[int, float] | None = None,
    *,
    total_steps: int | None = None,
    steps_per_loss: int = 1,
    learning_rate: float | Sequence[float] | None = None,
    vocabulary_size: int | None = None,
    zero_has_gradient: bool = False,
) -> HistoryFacts:
    """Describe a history; ``diagnose_history`` documents the arguments.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: No training losses, or a number outside its range; the message names the argument.
    """
    train = _numbers("train_losses", train_losses)
    if not train:
        raise ValueError("train_losses must hold at least one loss")
    steps_per_loss = as_count("steps_per_loss", steps_per_loss)
    if total_steps is not None:
        total_steps = as_count("total_steps", total_steps)
    if vocabulary_size is not None:
        vocabulary_size = as_count("vocabulary_size", vocabulary_size, least=2)
    peak, rates = _rates(learning_rate, len(train))
    evals = _evals(eval_losses, len(train) * steps_per_loss)
    nonfinite = tuple(i for i, loss in enumerate(train) if not math.isfinite(loss))
    zero_from = _zero_from(train)
    ends = [end for end in (*nonfinite[:1], zero_from) if end is not None]
    usable = train[: min(ends, default=len(train))]
    return HistoryFacts(
        train=train,
        evals=tuple(e for e in evals if math.isfinite(e.loss)),
        steps_per_loss=steps_per_loss,
        total_steps=total_steps,
        learning_rate=peak,
        rates=rates,
        vocabulary_size=vocabulary_size,
        nonfinite=nonfinite,
        nonfinite_evals=tuple(e.step for e in evals if not math.isfinite(e.loss)),
        zero_from=zero_from,
        zero_has_gradient=zero_has_gradient,
        usable=usable,
        repetition=repetition(usable),
        curve=curve_facts(usable) if len(usable) >= FEWEST_LOSSES and min(usable) >= 0 else None,
    )


def _rates(given: Any, count: int) -> tuple[float | None, tuple[float, ...]]:
    """The peak and the rate at each of ``count`` losses, the latter empty where they are not given."""
    if given is None:
        return None, ()
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
    several = several and getattr(given, "ndim", None) != 0
    rates = _numbers("learning_rate", given) if several else (as_number("learning_rate", given),)
    wrong = next((rate for rate in rates if not (math.isfinite(rate) and rate >= 0)), None)
    if wrong is not None:
        raise ValueError(f"learning_rate must be a finite number of at least 0, not {shown(wrong)}")
    if several and len(rates) != count:
        raise ValueError(
            f"learning_rate must hold one rate for each of {count} training losses, not {len(rates)}"
        )
    return max(rates), rates if several else ()


def _zero_from(train: Sequence[float]) -> int | None:
    count = sum(1 for _ in takewhile(lambda loss: loss == 0, reversed(train)))
    return len(train) - count if count >= 2 else None


def _evals(given: Iterable[float] | Mapping[int, float] | None, steps: int) -> tuple[EvalLoss, ...]:
    if given is None:
        return ()
    if isinstance(given, Mapping):
        losses = _numbers("eval_losses", list(given.values()))
        positions = [as_count("eval_losses", step, least=0) for step in given]
        return tuple(EvalLoss(*pair) for pair in sorted(zip(positions, losses, strict=True)))
    losses = _numbers("eval_losses", given)
    return tuple(EvalLoss(round(steps * (i + 1) / len(losses)), loss) for i, loss in enumerate(losses))


def _numbers(argument: str, given: Any) -> tuple[float, ...]:
    if isinstance(given, (str, bytes, Set, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a list of numbers, not {shown(given)}")
    found = require_items(argument, given, "a list of numbers", most=MOST_LOSSES)
    return tuple(as_number(f"{argument}[{i}]", loss) for i, loss in enumerate(found))


def as_number(argument: str, value: Any) -> float:
    """A number as a float, also one of NumPy or a tensor that holds one.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{argument} must be a number, not {shown(value)}")
    try:
        return float(value)
    except Exception as error:  # of a class of its own, of a tensor of several numbers, of 400 digits
        raise TypeError(f"{argument} must be one number, not {shown(value)}") from error


def as_count(argument: str, value: Any, *, least: int = 1) -> int:
    """A number of steps as an int.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below ``least``.
    """
    if isinstance(value, (bool, float)) or not hasattr(value, "__index__"):
        raise TypeError(f"{argument} must be a whole number of steps, not {shown(value)}")
    try:
        whole = index(value)
    except Exception as error:  # an array of several numbers has the method too
        raise TypeError(f"{argument} must be a whole number of steps, not {shown(value)}") from error
    return require_whole(argument, whole, least=least)
