"""How several GPUs share a training step, as facts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Offload = Literal["cpu", "optimizer"]

OFFLOADED: tuple[Offload, ...] = get_args(Offload)

STRATEGIES = ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
"""Ways to share a step among GPUs."""

SHARDED = ("fsdp1", "fsdp2", "zero3")
"""Those that divide the weights of the base too."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """How several GPUs share a step.

    Attributes:
        gpus: How many.
        strategy: One of ``STRATEGIES``.
        offload: What lies in the host's memory: ``"cpu"`` parameters, gradients and optimizer, ``"optimizer"`` the last
            alone; None for nothing.
        reshard_after_forward: Whether gathered parameters of a layer are freed after its forward.
        wrap: Classes of the layers that are gathered as a whole; empty for those that transformers names.
        options: Further settings of the strategy, by the names that its library gives them.
    """

    gpus: int
    strategy: str
    offload: Offload | None = None
    reshard_after_forward: bool = True
    wrap: tuple[str, ...] = ()
    options: tuple[tuple[str, Hashable], ...] = ()

    def option(self, name: str, default: Any) -> Any:
        """A further setting, or its default."""
        return dict(self.options).get(name, default)

    def __str__(self) -> str:
        offloaded = f", {self.offload} offload" if self.offload else ""
        return f"{self.gpus} GPUs, {self.strategy}{offloaded}"
