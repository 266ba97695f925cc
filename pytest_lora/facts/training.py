"""Facts about how adapters are trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OptimizerFacts:
    """What an optimizer holds, compared with what the model trains.

    Attributes:
        optimizer: Class name.
        held: Trainable parameters of the model that it holds.
        missing: Trainable parameters of the model that it does not hold.
        foreign: Number of parameters that it holds and the model does not have.
    """

    optimizer: str
    held: tuple[str, ...]
    missing: tuple[str, ...]
    foreign: int
