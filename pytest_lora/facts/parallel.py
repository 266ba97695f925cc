"""How several GPUs share a training step, as facts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Offload = Literal["cpu", "optimizer"]

OFFLOADED: tuple[Offload, ...] = get_args(Offload)

STRATEGIES = ("ddp", "fsdp1", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "tp", "device_map")
"""Ways to share a step among GPUs."""

FSDP = ("fsdp1", "fsdp2", "hsdp")
"""Those of torch's fully sharded data parallelism."""

WHOLE = ("ddp", "zero1", "zero2")
"""Those that leave every weight of the base on every GPU."""

SHARDED = (*FSDP, "zero3", "tp", "device_map")
"""Those that divide the weights of the base too."""

OFFLOAD_ENDING = "_offload"
"""What ends the name of a recipe's strategy that leaves weights in the host's memory."""


def divides_weights(strategy: str | None) -> bool:
    """Whether this strategy of a recipe divides the weights of the base among the cards."""
    return str(strategy).removesuffix(OFFLOAD_ENDING) in SHARDED


MACHINE = 8
"""GPUs among which ``hsdp`` divides where nothing else is said: those of one machine."""


MEASURED_ON = {"ddp": 2, "fsdp1": 2, "fsdp2": 2, "zero3": 8}
"""GPUs of the largest measured step that predictions were compared with, by strategy: published ones
(``benchmarks/multi_gpu.py``); of FSDP2 two ranks on a CPU (``tests/memory/test_parallel.py``)."""


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
        shard_size: Under ``hsdp`` how many GPUs divide the weights; every group of so many has them all. 0 for the
            others.
        options: Further settings of the strategy, by the names that its library gives them.
    """

    gpus: int
    strategy: str
    offload: Offload | None = None
    reshard_after_forward: bool = True
    wrap: tuple[str, ...] = ()
    shard_size: int = 0
    options: tuple[tuple[str, Hashable], ...] = ()

    def option(self, name: str, default: Any) -> Any:
        """A further setting, or its default."""
        return dict(self.options).get(name, default)

    @property
    def unmeasured(self) -> str:
        """What no measurement stands behind; empty where one does."""
        most = MEASURED_ON.get(self.strategy)
        if most and self.gpus <= most:
            return ""
        beyond = f" on more than {most} GPUs" if most else ""
        return f"no measured step with {self.strategy}{beyond} was compared with such figures"

    def __str__(self) -> str:
        offloaded = f", {self.offload} offload" if self.offload else ""
        groups = f" in groups of {self.shard_size}" if self.shard_size else ""
        return f"{self.gpus} GPUs, {self.strategy}{groups}{offloaded}"
