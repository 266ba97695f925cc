"""Floating-point operations: of a training step, in numbers, and what makers publish of their GPUs: the peak of matrix
products in 16 bits, without sparsity."""

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


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: As people call it.
        tflops: Peak of dense matrix products, in 10^12 operations a second. Data sheets often print twice as much,
            "with sparsity", which no training reaches.
        dtype: Of the products: ``"bfloat16"``, or ``"float16"`` where the GPU has no bfloat16.
        source: The maker's sheet.
        verified: Whether the figure was compared with a copy of that sheet, or a table that quotes it; else it is as
            commonly cited.
    """

    name: str
    tflops: float
    dtype: str
    source: str
    verified: bool = True


CARDS = (
    Card("H200", 989.0, "bfloat16", "NVIDIA H200 data sheet (1,979 with sparsity)"),
    Card("H100", 989.4, "bfloat16", "NVIDIA H100 (SXM5) architecture whitepaper (1,978.9 with sparsity)"),
    Card("H100-PCIe", 756.0, "bfloat16", "NVIDIA H100 data sheet (1,513 with sparsity)"),
    Card("B200", 2250.0, "bfloat16", "NVIDIA Blackwell data sheet (4.5 PFLOPS with sparsity)"),
    Card("A100", 312.0, "bfloat16", "NVIDIA A100 data sheet"),
    Card("L40S", 362.05, "bfloat16", "NVIDIA L40S data sheet (733 with sparsity)"),
    Card("A40", 149.7, "bfloat16", "NVIDIA A40 data sheet (299.4 with sparsity)"),
    Card("L4", 121.0, "bfloat16", "NVIDIA L4 data sheet (242 with sparsity)", verified=False),
    Card("A10", 125.0, "bfloat16", "NVIDIA A10 data sheet (250 with sparsity)", verified=False),
    Card("RTX-4090", 165.2, "bfloat16", "NVIDIA Ada architecture whitepaper", verified=False),
    Card("RTX-3090", 71.0, "bfloat16", "NVIDIA Ampere GA102 architecture whitepaper", verified=False),
    Card("T4", 65.0, "float16", "NVIDIA T4 data sheet"),
    Card("V100", 125.0, "float16", "NVIDIA V100 (SXM2) data sheet"),
    Card("MI300X", 1307.4, "bfloat16", "AMD Instinct MI300X data sheet (2,614.9 with sparsity)"),
)


def card_named(name: str) -> Card | None:
    """The card of a name, however it is spelled: ``"NVIDIA H100"``, ``"rtx 4090"``, ``"A100 80GB"``."""
    written = _plain(name)
    exact = [card for card in CARDS if _plain(card.name) == written]
    return exact[0] if exact else None


def _plain(name: str) -> str:
    words = name.lower().replace("-", " ").replace("_", " ").split()
    unsaid = {"nvidia", "amd", "geforce", "tesla", "instinct", "sxm", "sxm4", "sxm5", "tensor", "core", "gpu"}
    return "".join(word for word in words if word not in unsaid and not word.endswith(("gb", "gib")))
