"""The only place that touches what bitsandbytes does not document as public."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_REPACKS = "support_avx512bf16_for_cpu"


def keep_packing(model: nn.Module) -> None:
    """Keep 4-bit weights as they are on a CPU.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weight of a ``Linear4bit`` in place when it runs in
    evaluation mode, and gradients of training after that are wrong. This attribute turns that off.
    """
    for module in model.modules():
        if _REPACKS in vars(module):
            vars(module)[_REPACKS] = False
