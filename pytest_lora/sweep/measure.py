"""What training costs: wall time, operations, peak memory. Looks on from outside, whatever the training loop is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


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

    Counting operations slows each of them, so that only the first step is counted, up to the model's second forward
    pass with gradients, and the others in proportion to the numbers that go in (tokens of a language model). Where the
    loop does not call the model itself, all of the training is counted.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cuda = device.type == "cuda"
    cost = Cost()
    calls = _Calls(cost)
    hook = model.register_forward_pre_hook(calls, with_kwargs=True)
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        with calls.counting():
            yield cost
    finally:
        hook.remove()
        if cuda:
            _synchronize(device)
            cost.peak_bytes = torch.cuda.max_memory_allocated(device)
        cost.seconds = time.perf_counter() - start
        cost.flops = calls.flops()


def _synchronize(device: torch.device) -> None:
    """Wait for the GPU; what has failed there is raised where the training failed, and not once more here."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return


class _Calls:
    """A forward pre-hook that ends the counting at the second call, and adds up what goes in."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.counter: Any = FlopCounterMode(display=False)
        self.is_counting = False
        self.sizes: list[int] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.counter.__enter__()
        self.is_counting = True
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        if self.is_counting:
            self.is_counting = False
            self.counter.__exit__(None, None, None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if self.sizes:
            self._stop()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        size = tensors[0].numel() if tensors else 1
        if size > max(self.sizes, default=0):
            self.cost.batch = dict(kwargs)
        self.sizes.append(size)

    def flops(self) -> int | None:
        counted: int = self.counter.get_total_flops()
        if self.sizes and self.sizes[0]:
            counted = round(counted * (sum(self.sizes) / self.sizes[0]))
        return counted or None


def peak_memory(model: nn.Module, cost: Cost) -> tuple[int | None, str]:
    """Peak bytes of training, and how they are known: ``"measured"``, ``"estimated"``, or why there are none.

    Off the GPU, ``pytest_lora.estimate_memory`` tells what a step with the largest batch would take on one.
    """
    if cost.peak_bytes is not None:
        return cost.peak_bytes, "measured"
    if cost.batch is None:
        return None, "not estimated: the model itself was not called with a batch"
    from pytest_lora.memory import estimate_of_model

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
