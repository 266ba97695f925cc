"""Facts about an optimizer and its schedule, compared with what a model trains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["a", "b", "further", "saved", "rows", "bias", "base"]
"""What a parameter is: a low-rank factor, a further tensor of a variant (the magnitude of DoRA), part of a full copy
(``modules_to_save``), trained embedding rows, a bias that the configuration trains, or the base."""

_ADAPTIVE = re.compile(
    r"(Paged|Fused|Distributed|DeepSpeedCPU)?(Adam|AdamW|NAdam|RAdam|Adamax|RMSprop|Lion)(8bit|32bit|4bit|Fp8)?"
)

_ADAM = re.compile(r"(Paged|Fused|Distributed|DeepSpeedCPU)?(Adam|AdamW|NAdam|RAdam)(8bit|32bit|4bit|Fp8)?")

_PLAIN = ("SGD",)


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """One parameter group of an optimizer.

    Attributes:
        index: Its place.
        lr: Learning rate.
        initial_lr: What a scheduler noted as the rate before any schedule, or None.
        weight_decay: 0 where the optimizer has none.
        eps: The term that keeps Adam from dividing by zero, or None.
        parts: What trainable parameters of this model it holds, by kind, each once.
        dtypes: Dtypes of these parameters, each once.
        floor: Where the step is the rate times the size of the parameter (Adafactor), the least size that it takes;
            None where the rate is taken as it is.
    """

    index: int
    lr: float
    initial_lr: float | None
    weight_decay: float
    eps: float | None
    parts: tuple[Part, ...]
    dtypes: tuple[str, ...]
    floor: float | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """A trainable parameter that the optimizer does not hold."""

    name: str
    part: Part


@dataclass(frozen=True, slots=True)
class Misshapen:
    """A parameter whose running average in the optimizer has another shape.

    Attributes:
        name: Name in the model.
        shape: Its shape.
        average: That of its average.
    """

    name: str
    shape: tuple[int, ...]
    average: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OptimizerFacts:
    """What an optimizer holds, compared by identity with what the model trains.

    Attributes:
        optimizer: Class name.
        held: Trainable parameters of the model that it holds.
        missing: Those that it does not hold, inactive adapters aside.
        frozen: Number of parameters of the model that it holds and that require no gradient.
        foreign: Number of parameters that it holds and the model does not have.
        groups: Its parameter groups.
        doubled: Trainable parameters of the model that it holds more than once.
        steps: Most steps that it has counted for any trainable parameter of the model; 0 where it has counted none.
        misshapen: Trainable parameters whose running average has another shape.
        unmoved: Trainable low-rank factors that are all zero though it has counted steps for them, more than one, and
            their running average is not: a step would have moved them.
        allocation_begins: Step from which AdaLoRA takes ranks away, where its allocator was never called though;
            None where it was, or where there is none.
    """

    optimizer: str
    held: tuple[str, ...]
    missing: tuple[Missing, ...]
    frozen: int
    foreign: int
    groups: tuple[GroupFacts, ...]
    doubled: tuple[str, ...] = ()
    steps: int = 0
    misshapen: tuple[Misshapen, ...] = ()
    unmoved: tuple[str, ...] = ()
    allocation_begins: int | None = None

    @property
    def adaptive(self) -> bool:
        """Whether its step is about the learning rate, whatever the size of the gradient."""
        return _ADAPTIVE.fullmatch(self.optimizer) is not None

    @property
    def adam(self) -> bool:
        """Whether it divides by the root of a second moment plus eps."""
        return _ADAM.fullmatch(self.optimizer) is not None

    @property
    def plain(self) -> bool:
        """Whether its step is the gradient times the learning rate."""
        return self.optimizer in _PLAIN

    @property
    def holds_adapter(self) -> bool:
        """Whether it holds any trainable low-rank factor of the model."""
        return any({"a", "b"} & set(group.parts) for group in self.groups)

    @property
    def stale(self) -> bool:
        """Whether it holds parameters of something else instead of the adapter's."""
        return self.foreign > 0 and not self.holds_adapter and bool(self.lacks("a", "b"))

    def lacks(self, *parts: Part) -> tuple[str, ...]:
        """Names of missing parameters of some kinds."""
        return tuple(m.name for m in self.missing if m.part in parts)


@dataclass(frozen=True, slots=True)
class ScheduleFacts:
    """A learning-rate schedule.

    Attributes:
        schedule: Class name.
        steps_taken: Steps it has counted.
        peak: Largest rate that it gives at the steps that it answers for, where that is more than the first, else None.
        not_before: A step up to which its rate is below the peak, where that can be told, else None.
        ends: First step from which on its rate stays zero, where that can be told, else None.
        warm_up: Steps of its warm-up as it was made for (those of transformers say so), else None.
        planned: Optimizer steps in all that it was made for, else None.
        drives: Whether it sets the rate of the optimizer that trains.
        call: What makes the same schedule for an ``optimizer``, in Python; None where its arguments cannot be read.
    """

    schedule: str
    steps_taken: int
    peak: float | None
    not_before: int | None
    ends: int | None
    warm_up: int | None
    planned: int | None
    drives: bool
    call: str | None = None
