"""The fused head of TRL as its kernels on CUDA run it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytest_lora.inspection.memory.operations import product_flops
from pytest_lora.inspection.memory.swapped import swapped


@contextmanager
def fused_kernels(count: Callable[[int], None]) -> Iterator[None]:
    """Let TRL's fused head leave the storages that its CUDA kernels leave: they fold each tile in place.

    ``count`` is told the operations of the products among them. Tokens that are not scored are left out before the
    head; without values all are scored.
    """
    try:
        kernels: Any = importlib.import_module("trl.kernels.chunked_logprob")
    except ImportError:  # older than the fused head
        yield
        return
    utilities: Any = importlib.import_module("trl.trainer.utils")

    def fold(*_: Any, **__: Any) -> None:
        """In place."""

    def add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        count(product_flops(left, right))

    replaced = [
        (kernels, "_forward_tile", fold),
        (kernels, "_backward_tile", fold),
        (kernels, "_addmm_fp32", add_product),
        (utilities, "_use_triton", lambda device: True),
    ]
    with swapped(replaced):
        yield
