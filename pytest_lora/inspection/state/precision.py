"""How precisely numbers are computed and compared: TF32 and float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_cudnn: Any = torch.backends.cudnn
_NEW: tuple[Any, ...] = (torch.backends.cuda.matmul, _cudnn.conv)


def in_float64(tensor: Tensor) -> Tensor:
    """The numbers in float64, which Apple's GPUs do not have: from there they go to the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class Float32Precision:
    """torch's switches of TF32, by their old and their new names; torch refuses to read an old one that the new
    one contradicts."""

    def __init__(self) -> None:
        self._matmul = _old(torch.get_float32_matmul_precision)
        self._convolutions = _old(lambda: _cudnn.allow_tf32)
        self._new = [switch.fp32_precision for switch in _NEW]

    def restore(self) -> None:
        """Put them back; what is unchanged is not touched, as setting one moves another."""
        if self._matmul is not None and _old(torch.get_float32_matmul_precision) != self._matmul:
            torch.set_float32_matmul_precision(self._matmul)
        if self._convolutions is not None and _old(lambda: _cudnn.allow_tf32) != self._convolutions:
            _cudnn.allow_tf32 = self._convolutions
        for switch, own in zip(_NEW, self._new, strict=True):
            if switch.fp32_precision != own:
                switch.fp32_precision = own


def _old(read: Any) -> Any:
    """The value of a switch by its old name; None where only the new one is in use."""
    try:
        return read()
    except RuntimeError:
        return None


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let float32 be float32 inside: TF32 rounds its factors to 10 bits, about 5e-4 of each.

    For products of matrices it is on where the user asks for speed, for convolutions by default
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices).
    """
    before = Float32Precision()
    if _old(torch.get_float32_matmul_precision) in ("high", "medium"):
        torch.set_float32_matmul_precision("highest")
    if _old(lambda: _cudnn.allow_tf32):
        _cudnn.allow_tf32 = False
    for switch in _NEW:
        if switch.fp32_precision == "tf32":
            switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        before.restore()
