"""The base model under an adapter, as facts."""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from pytest_lora.facts.base import BaseFacts, BaseModule, FusedParameter, Quantization
from pytest_lora.inspection.heads import task_heads
from pytest_lora.inspection.survey import Survey

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
"""PEFT task types by the ending of a transformers class name (``peft.TaskType``)."""


PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Classes whose weights are as they are; subclasses may not be."""


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def quantization_of(module: nn.Module) -> str | None:
    """``"4bit"`` or ``"8bit"`` for bitsandbytes layers, the method for others, None for plain weights."""
    if type(module) in PLAIN:
        return None
    bnb = sys.modules.get("bitsandbytes")
    if bnb is not None:
        if isinstance(module, bnb.nn.Linear4bit):
            return "4bit"
        if isinstance(module, bnb.nn.Linear8bitLt):
            return "8bit"
    if hasattr(module, "qweight"):
        return "gptq or awq"
    return "hqq" if hasattr(module, "W_q") else None


def logical_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a module that LoRA can adapt, before any packing; else None."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    if type(module).__name__ == "Conv1D":
        weight: Any = module.weight
        return int(weight.shape[0]), int(weight.shape[1])
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and _has_weight(module):
        return sizes[0], sizes[1]
    return None


def _has_weight(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("weight", "qweight", "W_q"))


def embeddings_of(root: Any, side: Literal["input", "output"]) -> nn.Module | None:
    """The embedding that a model names as its input's, or its head; None where it has none or names none."""
    get = getattr(root, f"get_{side}_embeddings", None)
    try:
        module: nn.Module | None = None if get is None else get()
    except (NotImplementedError, AttributeError):
        return None
    return module


class BaseParameter(NamedTuple):
    """A parameter of the base: where it is and how many numbers it stands for."""

    module: str
    name: str
    quantization: str | None
    tensor: nn.Parameter
    numbers: int

    @property
    def full_name(self) -> str:
        """Name in the base model."""
        return f"{self.module}.{self.name}" if self.module else self.name


def own_parameters(module_name: str, module: nn.Module) -> Iterator[BaseParameter]:
    """The parameters that one module holds itself; a packed byte stands for several numbers."""
    own = [(name, tensor) for name, tensor in module._parameters.items() if tensor is not None]
    method = quantization_of(module) if own else None
    for name, tensor in own:
        packed = (method, name) in (("4bit", "weight"), ("hqq", "W_q"))
        shape = logical_shape(module) if packed else _packed_from(module, tensor)
        numbers = tensor.numel() if shape is None else math.prod(shape)
        yield BaseParameter(module_name, name, method, tensor, numbers)


def _packed_from(module: nn.Module, tensor: nn.Parameter) -> tuple[int, ...] | None:
    """Logical shape of a 4-bit tensor outside ``Linear4bit``: an embedding, or fused experts; else None."""
    state: Any = getattr(tensor, "quant_state", None)
    if state is None and isinstance(module, ParametrizationList):
        state = getattr(module[0], "quant_state", None)
    return None if state is None else tuple(state.shape)


def base_parameters(survey: Survey) -> tuple[BaseParameter, ...]:
    """Every parameter of the base, tied ones once, with the numbers that each stands for."""
    found: dict[int, BaseParameter] = {}
    for name, module in survey.modules.items():
        for parameter in own_parameters(name, module):
            found.setdefault(id(parameter.tensor), parameter)
    return tuple(found.values())


def base_facts(survey: Survey, parameters: tuple[BaseParameter, ...]) -> BaseFacts:
    """Everything that the rules ask about the base model."""
    root, modules = survey.root, survey.modules
    dtypes: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        if parameter.quantization is None and parameter.tensor.is_floating_point():
            dtypes[parameter.tensor.dtype] += parameter.numbers
    shaped = tuple(_base_modules(modules))
    names = {id(module): name for name, module in modules.items()}
    input_embeddings = _embedding(root, "input", names)
    output_embeddings = _embedding(root, "output", names)
    return BaseFacts(
        architecture=type(root).__name__,
        task_type=task_of(type(root).__name__, _config(root)),
        modules=shaped,
        module_names=tuple(name for name in modules if name),
        parameters=sum(p.numbers for p in parameters),
        layer_indices=_layer_indices(modules),
        heads=tuple(task_heads(root, modules, {module.name for module in shaped}, output_embeddings)),
        tied=_tied_modules(modules),
        input_embeddings=input_embeddings,
        output_embeddings=output_embeddings,
        vocab_size=_rows(modules.get(input_embeddings or "")),
        has_biases=any(p.name == "bias" for p in parameters),
        float_dtypes=tuple(dtype_name(dtype) for dtype, _ in dtypes.most_common()),
        device_types=tuple(dict.fromkeys(p.tensor.device.type for p in parameters)),
        quantization=_quantization(root, modules),
        carries_adapter=survey.carries_adapter,
        fused=tuple(
            FusedParameter(p.full_name, p.numbers) for p in parameters if _stacks_experts(p, modules)
        ),
        takes_input_ids=_takes_input_ids(root),
    )


def _takes_input_ids(root: nn.Module) -> bool:
    """Whether a forward takes ``input_ids``, as an argument of its own or among keywords that it leaves alone.

    The speech models of transformers 5 hand all keywords on to a decoder that has ``input_ids`` already.
    """
    try:
        arguments = inspect.signature(type(root).forward).parameters
    except (TypeError, ValueError):
        return True
    if "input_ids" in arguments or not any("input" in name or "values" in name for name in arguments):
        return True
    leaves_them = any(a.kind is inspect.Parameter.VAR_KEYWORD for a in arguments.values())
    return leaves_them and not type(root).__name__.endswith("ForConditionalGeneration")


def _stacks_experts(parameter: BaseParameter, modules: dict[str, nn.Module]) -> bool:
    """Whether a parameter stacks the matrices of several experts; kernels and positions have three dimensions too."""
    shape = parameter.tensor.shape
    names = (parameter.full_name, type(modules[parameter.module]).__name__)
    return (
        len(shape) == 3
        and shape[0] > 1
        and any(word in n.lower() for word in ("expert", "moe") for n in names)
    )


def _base_modules(modules: dict[str, nn.Module]) -> Iterator[BaseModule]:
    for name, module in modules.items():
        shape = logical_shape(module)
        if shape and name:
            yield BaseModule(name, type(module).__name__, *shape, quantization_of(module))


def task_of(architecture: str, config: Any) -> str | None:
    """The PEFT task type that fits a transformers class, by its name and its configuration; None where none does."""
    if architecture.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)


def _config(root: nn.Module) -> Any:
    return getattr(root, "config", None)


def is_index(part: str) -> bool:
    """Whether a part of a module's name is a number; some digits, as in "x²", are none."""
    return part.isdecimal() and len(part) < 12


def _layer_indices(modules: dict[str, nn.Module]) -> tuple[int, ...]:
    """Numbers at the first numbered level of module names, the one that ``layers_to_transform`` counts."""
    found = set()
    for name in modules:
        *path, last = name.split(".")
        if is_index(last) and not any(map(is_index, path)):
            found.add(int(last))
    return tuple(sorted(found))


def _embedding(root: nn.Module, side: Literal["input", "output"], names: dict[int, str]) -> str | None:
    module: Any = embeddings_of(root, side)
    while module is not None and id(module) not in names:
        module = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    return names.get(id(module))


def _rows(module: nn.Module | None) -> int | None:
    return module.num_embeddings if isinstance(module, nn.Embedding) else None


def _tied_modules(modules: dict[str, nn.Module]) -> tuple[tuple[str, ...], ...]:
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return tuple(tuple(group) for group in owners.values() if len(group) > 1)


def _quantization(root: nn.Module, modules: dict[str, nn.Module]) -> Quantization | None:
    declared, skipped = _declared_quantization(root)
    compute: dict[str, None] = {}
    unpacked = []
    quantized = False
    for name, module in modules.items():
        method = quantization_of(module)
        if method is None:
            continue
        quantized = True
        weight = getattr(module, "weight", None)
        if method == "4bit":
            compute_dtype: Any = module.compute_dtype
            compute[dtype_name(compute_dtype)] = None
            # FSDP puts another parameter in the place of the weight; the layer keeps the state as well.
            packed = any(getattr(held, "quant_state", None) is not None for held in (weight, module))
        else:
            packed = method != "8bit" or getattr(weight, "dtype", None) == torch.int8
            packed = packed or bool(getattr(getattr(module, "state", None), "has_fp16_weights", False))
        if not packed and getattr(getattr(weight, "device", None), "type", None) != "meta":
            unpacked.append(name)
    if not quantized and declared is None:
        return None
    return Quantization(declared, skipped, tuple(compute), tuple(unpacked))


def _declared_quantization(root: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    declared = getattr(_config(root), "quantization_config", None)
    values = declared if isinstance(declared, dict) else getattr(declared, "__dict__", {})
    bits = next((b for b in ("4bit", "8bit") if _says(values, f"load_in_{b}")), None)
    # Dequantizing a transformers model leaves is_loaded_in_4bit behind, but not is_quantized.
    if bits is None and getattr(root, "is_quantized", True):
        bits = next((b for b in ("4bit", "8bit") if getattr(root, f"is_loaded_in_{b}", False)), None)
    return bits, tuple(values.get("llm_int8_skip_modules") or ())


def _says(values: dict[str, Any], key: str) -> bool:
    return bool(values.get(key) or values.get(f"_{key}"))
