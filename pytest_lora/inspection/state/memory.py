"""Where the values of a tensor lie: dense tensors that can be read and written bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


class OpaqueTensorError(Exception):
    """Nobody gets at the memory of a tensor; says of what kind it is."""


def memory_of(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Dense tensors that together hold the values of a tensor, under the names that they have in it.

    An ordinary tensor is its own memory, under no name, and one on the meta device has none.

    Raises:
        OpaqueTensorError: It has memory that cannot be read or written, as those of MKL-DNN have.
    """
    if tensor.is_meta:
        return
    if is_lazy(tensor):
        raise OpaqueTensorError("not initialized yet")
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            held = getattr(tensor, name)
            if isinstance(held, Tensor):  # one that is spread over ranks keeps their mesh there
                for inner, part in memory_of(held):
                    yield f".{name}{inner}", part
    elif tensor.layout in _SPARSE_PARTS:
        for method in _SPARSE_PARTS[tensor.layout]:
            yield f".{method}", getattr(tensor.detach(), method)()
    elif tensor.layout is not torch.strided:
        raise OpaqueTensorError(f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}")
    elif tensor.is_nested:
        yield ".values", tensor.detach().values()
    elif tensor.is_quantized or _overlaps(tensor):
        storage = tensor.untyped_storage()
        yield ".storage", torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    else:
        yield "", tensor


def _overlaps(tensor: Tensor) -> bool:
    """Whether numbers of a tensor share memory, as in ``expand``: torch writes to few such tensors."""
    if tensor.is_contiguous():
        return False
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    reach, nested = 0, True
    for stride, size in sorted((stride, size) for stride, size in steps if size > 1):
        nested &= stride > reach
        reach += (size - 1) * stride
    if nested or reach < tensor.numel() - 1:
        return not nested
    # Rows that lie between one another, as in ``as_strided``: only the places themselves tell.
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = (places[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    places = places.sort().values
    return bool((places[1:] == places[:-1]).any())
