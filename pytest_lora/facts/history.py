"""Facts about the losses that a run has logged so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pytest_lora.facts.curve import (
    NOISE_WINDOW,
    Fall,
    Level,
    alternation,
    clearest_fall,
    cycles,
    deviations,
    level,
    levels,
    noise,
    repetition,
    smoothed,
    swings,
    typical,
)

FEWEST_LOSSES = 10
"""From so many losses on a curve has statistics; below, only what one loss shows by itself counts."""

FITS = 0.1
"""At a loss below this, in nats per token, the model fits: each token has a probability of 0.9. Nothing that a
curve does down there is a fault."""

SWING = 0.3
"""A swing is a rise by this share of the starting loss, and beyond the noise, that is taken back again."""

SWING_NOISE = 5.0
"""A swing is higher than this many standard deviations of the noise; 1,000 losses of white noise span 7, and
4.5 after the running median of three under which swings are counted."""


@dataclass(frozen=True, slots=True)
class CurveFacts:
    """What a curve of at least ``FEWEST_LOSSES`` losses looks like.

    Attributes:
        start: Level of the first losses.
        lowest: The lowest level.
        highest: The highest level.
        end: Level of the last losses.
        peak: The highest loss, outliers of one or two steps aside.
        peak_at: Its index.
        fall: The clearest fall anywhere.
        noise: Standard deviation of the noise between neighbouring losses.
        deviation: Typical deviation from the trend, as a share of the loss.
        swings: How often the curve rose widely and came down again.
        alternation: How strongly it goes up and down within few losses, 0 to 1.
        cycles: Whether the same batches come again and again, which alone makes a curve go up and down.
        levels: Levels from start to end.
    """

    start: Level
    lowest: Level
    highest: Level
    end: Level
    peak: float
    peak_at: int
    fall: Fall
    noise: float
    deviation: float
    swings: int
    alternation: float
    cycles: bool
    levels: tuple[Level, ...]


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
    learning_rate: float | None = None,
    zero_has_gradient: bool = False,
) -> HistoryFacts:
    """Describe a history; ``diagnose_history`` documents the arguments.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: No training losses, or a number outside its range; the message names the argument.
    """
    train = _losses("train_losses", train_losses)
    if not train:
        raise ValueError("train_losses must hold at least one loss")
    steps_per_loss = as_count("steps_per_loss", steps_per_loss)
    if total_steps is not None:
        total_steps = as_count("total_steps", total_steps)
    if learning_rate is not None:
        learning_rate = as_number("learning_rate", learning_rate)
        if not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise ValueError(f"learning_rate must be a finite number of at least 0, not {learning_rate!r}")
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
        learning_rate=learning_rate,
        nonfinite=nonfinite,
        nonfinite_evals=tuple(e.step for e in evals if not math.isfinite(e.loss)),
        zero_from=zero_from,
        zero_has_gradient=zero_has_gradient,
        usable=usable,
        repetition=repetition(usable),
        curve=curve_facts(usable) if len(usable) >= FEWEST_LOSSES and min(usable) >= 0 else None,
    )


def curve_facts(losses: Sequence[float]) -> CurveFacts:
    """The statistics of at least ``FEWEST_LOSSES`` losses, none of them negative."""
    known = levels(losses)
    start = level(losses, 0, 3)
    deviation = noise(losses)
    smooth = smoothed(losses, 5)
    rest = deviations(losses)
    third = max(NOISE_WINDOW, len(losses) // 3)
    # Noise grows with the loss, so that the third in which a curve is high is louder than the whole.
    loudest = max(noise(part) for part in (losses, losses[:third], losses[-third:]))
    peak_at = max(range(len(smooth)), key=smooth.__getitem__)
    return CurveFacts(
        start=start,
        lowest=min(known, key=lambda one: one.value),
        highest=max(known, key=lambda one: one.value),
        end=known[-1],
        peak=smooth[peak_at],
        peak_at=peak_at,
        fall=clearest_fall(losses),
        noise=deviation,
        deviation=typical(rest),
        swings=swings(smoothed(losses, 3), max(SWING * start.value, SWING_NOISE * loudest)),
        alternation=alternation(rest),
        cycles=cycles(rest),
        levels=known,
    )


def _zero_from(train: Sequence[float]) -> int | None:
    count = sum(1 for _ in takewhile(lambda loss: loss == 0, reversed(train)))
    return len(train) - count if count >= 2 else None


def _evals(given: Iterable[float] | Mapping[int, float] | None, steps: int) -> tuple[EvalLoss, ...]:
    if given is None:
        return ()
    if isinstance(given, Mapping):
        losses = _losses("eval_losses", list(given.values()))
        positions = [as_count("eval_losses", step, least=0) for step in given]
        return tuple(EvalLoss(*pair) for pair in sorted(zip(positions, losses, strict=True)))
    losses = _losses("eval_losses", given)
    return tuple(EvalLoss(round(steps * (i + 1) / len(losses)), loss) for i, loss in enumerate(losses))


def _losses(argument: str, given: Any) -> tuple[float, ...]:
    if isinstance(given, (str, bytes, Set, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a list of losses, not {type(given).__name__}")
    return tuple(as_number(f"{argument}[{i}]", loss) for i, loss in enumerate(given))


def as_number(argument: str, value: Any) -> float:
    """A number as a float, also one of NumPy or a tensor that holds one.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{argument} must be a number, not {type(value).__name__} {value!r:.40}")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{argument} must be one number, not {value!r:.40}") from error


def as_count(argument: str, value: Any, *, least: int = 1) -> int:
    """A number of steps as an int.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below ``least``.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{argument} must be a whole number of steps, not {value!r:.40}")
    steps = int(value)
    if steps < least:
        raise ValueError(f"{argument} must be at least {least}, not {steps}")
    return steps
