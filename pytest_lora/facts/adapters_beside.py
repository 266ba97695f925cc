"""Facts about several adapters on one model, compared with each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CombinedAdapter:
    """An adapter whose factors are a sum of those of others (``add_weighted_adapter``).

    Attributes:
        adapter: Its name.
        sources: Adapters that it was summed of.
        kinds: What its configuration took over from them and the sum does not carry: ``"use_rslora"``, ``"use_dora"``,
            ``"lora_bias"``, ``"kasa_config"``.
        scaling: Its scaling in effect; the sum holds all scalings in its factors, so that 1 is right.
        subtracted: Those of its sources that have a negative weight, where each factor is a sum by itself.
        missed: Norm of what such an update has besides the weighted sum of the updates of its sources, over the norm
            of that sum.
    """

    adapter: str
    sources: tuple[str, ...]
    kinds: tuple[str, ...]
    scaling: float
    subtracted: tuple[str, ...] = ()
    missed: float = 0.0
