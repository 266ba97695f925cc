"""Pickled adapters, on request only, and then by torch's loader that builds nothing but tensors."""

from __future__ import annotations

from dataclasses import replace

from pytest_lora.facts.checkpoint import FileFault
from pytest_lora.facts.saved_tensors import TensorFacts
from pytest_lora.inspection.checkpoint.folder import Folder, UnreadableError
from pytest_lora.inspection.checkpoint.values import (
    LAYOUTS,
    bits_like,
    is_measured,
    marks_of,
    root_mean,
    sum_of_squares,
)

NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3",
}
"""Dtypes of torch as safetensors calls them; others keep their own names."""


def read_pickled(folder: Folder, name: str) -> tuple[TensorFacts, ...]:
    """The tensors of a pickled state dict; all of it is held in memory.

    Raises:
        UnreadableError: It cannot be read, or holds anything but tensors.
    """
    import torch

    with folder.opened(name) as (file, _):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises many kinds on damaged files
            first = str(error).strip().partition("\n")[0]
            raise UnreadableError(
                FileFault(name, "format", f"torch.load(weights_only=True) refuses it: {first[:200]}")
            ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise UnreadableError(FileFault(name, "format", "it holds something else than named tensors"))
    return tuple(_facts(key, value) for key, value in state.items())


def _facts(name: str, tensor: object) -> TensorFacts:
    import torch

    assert isinstance(tensor, torch.Tensor)
    dtype = NAMES.get(str(tensor.dtype), str(tensor.dtype).removeprefix("torch.").upper())
    values = None
    if dtype in LAYOUTS and tensor.layout == torch.strided:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        values = bits_like(raw, dtype)
        if is_measured(name, dtype):
            values = replace(values, rms=root_mean(sum_of_squares(raw, dtype), raw.nbytes, dtype))
        if marked := marks_of(name, dtype, tuple(tensor.shape)):
            marked.add(raw)
            values = replace(values, marks=marked.marks())
    return TensorFacts(name, dtype, tuple(tensor.shape), values)
