"""What hooks see of a run: the steps of an optimizer, and the wrapper through which a model is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from pytest_lora.runs.watch import Watch


@contextmanager
def at_each_step(watch: Watch, model: nn.Module, optimizer: Any, *, scaler: bool = False) -> Iterator[None]:
    """Let an optimizer tell a watch of its steps, as far as it is one of torch's.

    Args:
        watch: What takes the steps.
        model: What is trained.
        optimizer: What trains it, or a wrapper around it.
        scaler: Whether a GradScaler may leave steps out.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(inner, "register_step_pre_hook"):
        yield
        return

    def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        closure = arguments[1] if len(arguments) > 1 else named.get("closure")
        if closure is None:
            watch.before_step(model, optimizer, scaler=scaler)
            return None
        # With a closure the gradients come only inside the step.
        noting = _noting(closure, lambda: watch.before_step(model, optimizer, scaler=scaler))
        rest = {name: value for name, value in named.items() if name != "closure"}
        return (arguments[0], noting, *arguments[2:]), rest

    def after(*_: Any) -> None:
        watch.after_step()

    handles: list[Any] = []
    # An optimizer that wraps another need not call Optimizer.__init__, and then takes no hooks.
    with suppress(AttributeError):
        handles += inner.register_step_pre_hook(before), inner.register_step_post_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noting(closure: Callable[[], Any], note: Callable[[], None]) -> Callable[[], Any]:
    """A closure that notes the gradients when it has computed them for the first time."""
    noted = False

    def compute() -> Any:
        nonlocal noted
        result = closure()
        if not noted:
            noted = True
            note()
        return result

    return compute


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
