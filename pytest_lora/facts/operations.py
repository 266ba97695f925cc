"""Floating-point operations of a training step, in numbers."""

from __future__ import annotations

from typing import NamedTuple


class StepFlops(NamedTuple):
    """Floating-point operations of the matrix products of one optimizer step, all its micro-batches together.

    A product of an (m, k) with a (k, n) matrix counts 2 m k n, as in ``torch.utils.flop_counter``. What works number
    by number (activations, norms, the optimizer) is not counted: it takes time for the memory it reads.

    Attributes:
        forward: Of the forward passes, those of a reference model included.
        backward: Of the backward passes; what checkpointing computes again is among them.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


NO_FLOPS = StepFlops(0, 0)

_UNITS = ((10**18, "EFLOP"), (10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP"), (10**6, "MFLOP"))


def format_flops(count: float) -> str:
    """A number of operations with three digits: ``"81.3 TFLOP"``."""
    for size, unit in _UNITS:
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} FLOP"


_IN_WORDS = (
    ("log_softmax", "log-softmax of the loss over the vocabulary"),
    ("nll_loss", "cross entropy of the loss"),
    ("scaled_dot_product", "attention"),
    ("softmax", "softmax of attention scores"),
    ("dequantize", "unpacking of a quantized weight"),
    ("to_copy", "cast to another dtype"),
    ("adam", "step of the optimizer"),
    ("foreach", "step of the optimizer"),
    ("silu", "activation function"),
    ("gelu", "activation function"),
    ("sigmoid", "activation function"),
    ("embedding", "embedding of the tokens"),
    ("norm", "norm"),
    ("dropout", "dropout"),
    ("cat", "joining of tensors"),
    ("mm", "matrix product"),
    ("matmul", "matrix product"),
    ("mul", "product, number by number"),
    ("add", "sum, number by number"),
)
"""What operations of PyTorch do, by a part of their names; the first that fits counts."""


def operation_in_words(name: str) -> str:
    """``"log-softmax of the loss over the vocabulary"``; another operation by its name, less what PyTorch adds."""
    plain = name.split(".")[1] if name.count(".") else name
    found = next((words for part, words in _IN_WORDS if part in plain), "")
    return found or plain.strip("_").replace("_", " ")
