"""The steps of an optimizer, seen by hooks that it carries meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    handles = inner.register_step_pre_hook(before), inner.register_step_post_hook(after)
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
