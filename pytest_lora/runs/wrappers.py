"""The wrapper through which a model is called, which not everyone shows who has the model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class CalledThrough:
    """Finds the ``DistributedDataParallel`` that a model is called through, with the model's next forward.

    The Trainer tells its callbacks of the model inside. DDP says which one of it runs while it calls that, as torch's
    compiler asks it to; so a hook looks once, and is gone before the forward begins. Without a process group there is
    no hook.

    Args:
        model: The model inside.
        found: Called with the wrapper, before the forward; not at all where nothing wraps the model.
    """

    def __init__(self, model: nn.Module, found: Callable[[nn.Module], None]) -> None:
        self._found = found
        self._handle: Any = None
        distributed: Any = importlib.import_module("torch.distributed")
        if distributed.is_available() and distributed.is_initialized():
            self._handle = model.register_forward_pre_hook(self._note, prepend=True)

    def forget(self) -> None:
        """Leave no hook on a model that is not called again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _note(self, model: nn.Module, _: Any) -> None:
        self.forget()
        kind: Any = importlib.import_module("torch.nn.parallel.distributed").DistributedDataParallel
        running = kind._get_active_ddp_module()
        if running is not None and running.module is model:
            self._found(running)
