"""The learning rate of a trial, where the user gives none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pytest_lora.facts.model_parts import LayerState

USUAL_MODULES = 10
USUAL_STRENGTH = 2 * math.sqrt(8)
"""Scaling 2 at rank 8."""

RATE = 1e-2
"""Measured on tiny Llama, GPT-2, T5, BERT and the built-in base, ranks 1 to 64: of 1e-3, 3e-3, 1e-2 and 3e-2 the one
whose smallest drop in 20 steps is the largest (3 %)."""

LOWEST = RATE / 100
"""Where very many modules or a huge scaling ask for less. Adam moves each number by about the rate a step: twenty steps
of this move the numbers of ``lora_A``, which PEFT draws at about 0.02 for a width of 1,000, by a tenth."""


def suitable_rate(layers: Sequence[LayerState]) -> float:
    """A learning rate for Adam at which some twenty steps move adapters far enough and not too far.

    A step of size ``lr`` in every number of ``lora_B`` changes the output of a module by about
    ``lr * scaling * sqrt(rank / 3)`` of the size of its input, whatever its width, and the changes of all modules add
    up. This is kept at what ``RATE`` gives ten modules of rank 8 and scaling 2; a 7B model with rank 16 on all its
    linear layers gets 3e-4.
    """
    strength = max((abs(layer.scaling) * math.sqrt(layer.rank) for layer in layers), default=0.0)
    if not strength:
        return RATE
    rate = RATE * (USUAL_STRENGTH / strength) * (USUAL_MODULES / len(layers))
    highest = 3 * RATE if strength < 1 else RATE
    return min(max(rate, LOWEST), highest)
