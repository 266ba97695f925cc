"""What training costs: wall time, operations, peak memory. Looks on from outside, whatever the training loop is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from pytest_lora.inspection.peft_internals import LoraLayer


@dataclass
class Cost:
    """What was seen of a training.

    Attributes:
        seconds: Wall time.
        flops: Floating-point operations, of the operators that torch has formulas for; None where it counted none.
        peak_bytes: Peak of allocated memory on the model's GPU; None on other devices.
        batch: The largest batch that the model was trained on, for an estimate of memory.
    """

    seconds: float = 0.0
    flops: int | None = None
    peak_bytes: int | None = None
    batch: dict[str, Any] | None = None


@contextmanager
def cost_of_training(model: nn.Module) -> Iterator[Cost]:
    """Measure what happens inside; the cost is complete when the block ends, also by an exception.

    Counting operations slows each of them, so that they are counted up to the end of the first step of an optimizer
    only; the rest is in proportion to the numbers that go into the model (tokens of a language model), or to the steps
    where the loop does not call the model itself. Without any step of a ``torch.optim`` optimizer all is counted.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cuda = device.type == "cuda"
    cost = Cost()
    watch = _Watch(cost)
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        with watch.on(model):
            yield cost
    finally:
        if cuda:
            _synchronize(device)
            cost.peak_bytes = torch.cuda.max_memory_allocated(device)
        cost.seconds = time.perf_counter() - start
        cost.flops = watch.flops()


def _synchronize(device: torch.device) -> None:
    """Wait for the GPU; what has failed there is raised where the training failed, and not once more here."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return


class _Watch:
    """Hooks on the model's forward passes and on steps of any optimizer."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.counter: Any = FlopCounterMode(display=False)
        self.is_counting = False
        self.steps = 0
        self.before_steps: int | None = None
        self.seen = self.seen_counting = self.largest = 0

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        hooks = (
            model.register_forward_pre_hook(self._forward, with_kwargs=True),
            *(layer.register_forward_pre_hook(self._begin) for layer in layers),
            register_optimizer_step_post_hook(self._stepped),
        )
        self.counter.__enter__()
        self.is_counting = True
        try:
            yield
        finally:
            self._stop()
            for hook in hooks:
                hook.remove()

    def _stop(self) -> None:
        if self.is_counting:
            self.is_counting = False
            self.counter.__exit__(None, None, None)

    def _begin(self, *_: Any) -> None:
        """What was counted before the first forward pass is no part of a step: a teacher's logits, say."""
        if self.before_steps is None and torch.is_grad_enabled():
            self.before_steps = self.counter.get_total_flops()

    def _stepped(self, *_: Any) -> None:
        self.steps += 1
        self._stop()

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        self._begin()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        size = tensors[0].numel() if tensors else 1
        if size > self.largest:
            self.largest, self.cost.batch = size, dict(kwargs)
        self.seen += size
        if self.is_counting:
            self.seen_counting += size

    def flops(self) -> int | None:
        counted: int = self.counter.get_total_flops()
        once = self.before_steps or 0
        if self.seen_counting:
            counted = once + round((counted - once) * (self.seen / self.seen_counting))
        elif self.steps:
            counted = once + (counted - once) * self.steps
        return counted or None


def peak_memory(model: nn.Module, cost: Cost) -> tuple[int | None, str]:
    """Peak bytes of training, and how they are known: ``"measured"``, ``"estimated"``, or why there are none.

    Off the GPU, ``pytest_lora.estimate_memory`` tells what a step with the largest batch would take on one.
    """
    if cost.peak_bytes is not None:
        return cost.peak_bytes, "measured"
    if cost.batch is None:
        return None, "not estimated: the model itself was not called with a batch"
    from pytest_lora.memory.estimate import estimate_of_model

    try:
        estimate = estimate_of_model(model, cost.batch)
    except Exception as error:  # whatever cannot be traced costs the number, not the trial
        return None, f"not estimated: {type(error).__name__}: {first_line(error)}"
    if estimate is None:
        return None, "not estimated: the model has no configuration, or its batch no input_ids"
    return estimate.peak_allocated, "estimated"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""
