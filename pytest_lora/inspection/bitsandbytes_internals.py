"""The only place that touches what bitsandbytes does not document as public."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_REPACKS = "support_avx512bf16_for_cpu"
_BLOCK = 64
_NESTED_BLOCK = 256


def keep_packing(model: nn.Module) -> None:
    """Keep 4-bit weights as they are on a CPU.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weight of a ``Linear4bit`` in place when it runs in
    evaluation mode, and gradients of training after that are wrong. This attribute turns that off.
    """
    for module in model.modules():
        if _REPACKS in vars(module):
            vars(module)[_REPACKS] = False


def pack_on_meta(module: Any, dtype: torch.dtype) -> None:
    """Give a ``Linear4bit`` or ``Linear8bitLt`` the weight without values that it has once quantized.

    Args:
        module: A layer of bitsandbytes whose weight is still whole.
        dtype: Dtype of the weight before it was quantized, which is that of its bias and its results.
    """
    import torch
    from torch import nn

    if module.bias is not None:
        module.bias = nn.Parameter(torch.empty_like(module.bias, dtype=dtype, device="meta"), False)
    if isinstance(module, _layers().Linear8bitLt):
        _pack_in_8_bits(module)
    else:
        _pack_in_4_bits(module, dtype)


def pack_linear_layers(model: nn.Module) -> None:
    """Pack the linear layers of a live model to NF4 in place, but the last one and the output head.

    transformers keeps those two as they are when it loads a model in 4 bits.
    """
    from torch import nn

    from pytest_lora.inspection.base import embeddings_of

    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    head = embeddings_of(model, "output")
    last = next(reversed(layers), None)
    for name, layer in layers.items():
        if name != last and layer is not head:
            model.set_submodule(name, _packed(layer))
    keep_packing(model)
    vars(model)["is_loaded_in_4bit"] = True


def _packed(layer: nn.Linear) -> Any:
    packed = _layers().Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
    )
    packed.weight = _layers().Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", module=packed
    )
    packed.bias = layer.bias
    return packed.to(layer.weight.device)


def unpack_linear_layers(model: nn.Module) -> None:
    """Put whole linear layers with the values of the packed ones into their place."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from torch import nn

    unpack: Any = dequantize_4bit
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, _layers().Linear4bit):
            continue
        with torch.no_grad():
            weight = unpack(layer.weight.data, layer.weight.quant_state)
        whole = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        whole.weight, whole.bias = nn.Parameter(weight, False), layer.bias
        model.set_submodule(name, whole)
    vars(model)["is_loaded_in_4bit"] = False


def was_packed_for_cpu(model: nn.Module) -> bool:
    """Whether evaluation on a CPU has packed 4-bit weights anew, be it undone since."""
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    return any(hasattr(state, "packing_format_for_cpu") for state in states)


def unpack_for_cpu(model: nn.Module) -> None:
    """Undo that packing, as ``Linear4bit`` does when it is saved; the scales stay rounded to bfloat16."""
    if was_packed_for_cpu(model):
        for layer in quantized_layers(model):
            layer.state_dict()


def pack_for_cpu(model: nn.Module) -> None:
    """Pack 4-bit weights as an evaluation on this CPU does."""
    import torch

    for module in quantized_layers(model):
        layer: Any = module
        kept = dict(vars(layer))
        vars(layer)[_REPACKS] = True
        with torch.no_grad():
            layer.eval()(torch.zeros(1, layer.in_features))
        if _REPACKS not in kept:
            del vars(layer)[_REPACKS]
        vars(layer).update(kept)


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of bitsandbytes in a model."""
    kinds = (_layers().Linear4bit, _layers().Linear8bitLt)
    return [module for module in model.modules() if isinstance(module, kinds)]


def holds_8_bit_weights(model: nn.Module) -> bool:
    """Whether a model has 8-bit layers of bitsandbytes, whose scales are no buffers that move with it."""
    return "bitsandbytes" in sys.modules and any(
        isinstance(module, _layers().Linear8bitLt) for module in model.modules()
    )


def _layers() -> Any:
    import bitsandbytes.nn

    return bitsandbytes.nn


def quantization_statistics(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors beside a quantized weight: scales, code books, offsets."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        rows = getattr(parameter, "SCB", None)
        return [] if rows is None else [rows]
    nested = getattr(state, "state2", None)  # packing for the CPU, which evaluation does, takes it away
    found = [state.absmax, state.code, state.offset, *((nested.absmax, nested.code) if nested else ())]
    return [tensor for tensor in found if tensor is not None]


def _pack_in_8_bits(module: Any) -> None:
    import torch

    packed = torch.empty(module.out_features, module.in_features, dtype=torch.int8, device="meta")
    rows = torch.empty(module.out_features, dtype=torch.float32, device="meta")
    module.weight = _layers().Int8Params(packed, requires_grad=False, CB=packed, SCB=rows)
    # With a threshold the number of outlier columns depends on values; they are few.
    module.state.threshold = 0.0


def _pack_in_4_bits(module: Any, dtype: torch.dtype) -> None:
    import torch
    from bitsandbytes.functional import QuantState

    make_state: Any = QuantState
    whole = module.weight
    numbers, blocks = whole.numel(), -(-whole.numel() // _BLOCK)

    def empty(size: int, kind: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    nested = None
    if whole.compress_statistics:
        nested = make_state(
            absmax=empty(-(-blocks // _NESTED_BLOCK), torch.float32),
            code=empty(256, torch.float32),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = make_state(
        absmax=empty(blocks, torch.uint8 if nested else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        code=empty(16, torch.float32),
        blocksize=_BLOCK,
        quant_type=whole.quant_type,
        dtype=dtype,
        offset=torch.empty((), dtype=torch.float32, device="meta") if nested else None,
        state2=nested,
    )
    storage = whole.quant_storage
    module.weight = _layers().Params4bit(
        torch.empty((numbers + 1) // 2 // storage.itemsize, 1, dtype=storage, device="meta"),
        requires_grad=False,
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=whole.compress_statistics,
        quant_type=whole.quant_type,
        quant_storage=storage,
        bnb_quantized=True,
        module=module,
    )
    module.quant_state = state
