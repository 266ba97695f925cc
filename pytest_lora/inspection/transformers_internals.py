"""The only place that touches what transformers does not document as public."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from pytest_lora.inspection.base import embeddings_of
from pytest_lora.inspection.bitsandbytes_internals import quantized_layers
from pytest_lora.inspection.survey import Survey

TIES_WHAT_DIFFERS = Version(transformers.__version__) < Version("5")
"""Whether ``from_pretrained`` ties embeddings that the files hold twice, with different numbers."""

READS_OTHER_PREFIXES = Version(transformers.__version__) >= Version("5")
"""Whether ``load_adapter`` puts ``base_model_prefix`` before the keys of an adapter, or takes it off, as they need."""


def reentrant_without_inputs(found: Survey) -> bool:
    """Whether reentrant checkpointing is on while nothing makes its input require gradients.

    Reentrant checkpointing runs its segment without a graph unless an input requires gradients
    (``torch.utils.checkpoint``). Either the embeddings train something themselves, or a hook makes their
    output require gradients: transformers' ``enable_input_require_grads`` and PEFT both register one.
    """
    if not any(checkpoints_reentrant(module) for module in found.modules.values()):
        return False
    return not (_trains_embeddings(found) or _makes_inputs_require_grad(found.root))


def checkpoints_reentrant(module: nn.Module) -> bool:
    """Whether a module checkpoints reentrantly, which is torch's default where nothing is said."""
    if not vars(module).get("gradient_checkpointing", False):
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    return isinstance(function, partial) and function.keywords.get("use_reentrant") is not False


def _trains_embeddings(found: Survey) -> bool:
    inputs = embeddings_of(found.root, "input")
    names = [name for name, module in found.modules.items() if isinstance(module, nn.Embedding)]
    wrappers: tuple[Mapping[str, Any], ...] = (found.lora, found.saved, found.tokens, found.modules)
    embeddings: list[Any] = [inputs, *(wrapper.get(name) for name in names for wrapper in wrappers)]
    return any(p.requires_grad for module in embeddings if module is not None for p in module.parameters())


def _makes_inputs_require_grad(root: nn.Module) -> bool:
    return any(
        _calls_requires_grad(hook)
        for module in root.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def _calls_requires_grad(hook: Callable[..., Any]) -> bool:
    """Whether a hook's code mentions ``requires_grad``; one without readable code may do anything."""
    code = getattr(hook, "__code__", None)
    return code is None or any(name.startswith("requires_grad") for name in code.co_names)


def quantized_linears(model: nn.Module, quantization: Any) -> list[nn.Module]:
    """Replace the linear layers that transformers would quantize by bitsandbytes' own, weights aside.

    Args:
        model: A transformers model on the meta device; it is changed.
        quantization: A ``BitsAndBytesConfig``.

    Returns:
        The new layers.
    """
    from transformers.integrations import bitsandbytes as integration

    kept = kept_whole(model, quantization.llm_int8_skip_modules)
    integration.replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=quantization)
    return quantized_layers(model)


def kept_whole(model: Any, skipped: list[str] | None) -> list[str]:
    """Layers that transformers leaves whole: those skipped, or else the output embeddings; and those in float32."""
    from transformers.quantizers.base import HfQuantizer

    quantizer: Any = HfQuantizer
    names: list[str] = quantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    return names


def reads_both_ways(config: Any) -> bool:
    """Whether a configuration is that of an encoder, which there are masked language models of."""
    from transformers.models.auto import modeling_auto

    encoders: Mapping[str, str] = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return getattr(config, "model_type", None) in encoders and not getattr(config, "is_decoder", False)


def runs_images_without_values() -> bool:
    """Whether the switch of ``masks_without_values`` is there; transformers 4 compares images and text by value."""
    from transformers.utils import import_utils

    return hasattr(import_utils, "torch_compilable_check")


def masks_where_nothing_is_masked() -> bool:
    """Whether attention gets a mask where a batch has none and no cache is kept.

    transformers 4 then looks for packed sequences in the positions, and builds a mask whatever it finds
    (``masking_utils.find_packed_sequence_indices``); a mask of ones, as tokenizers give, it leaves out.
    """
    from transformers import masking_utils

    return not hasattr(masking_utils, "fast_all")


@contextmanager
def masks_without_values() -> Iterator[None]:
    """Let transformers ask a mask without values whether it masks anything (see ``StorageTracker``).

    It also compares the number of placeholders in a text with the number of image features, which no text
    without values can pass; its own switch turns that off.
    """
    from transformers import masking_utils

    replaced: Any = masking_utils
    if not hasattr(replaced, "fast_all"):  # before transformers 5, which has neither this nor the switch
        yield
        return
    switch, before = "TRANSFORMERS_DISABLE_TORCH_CHECK", os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK")
    fast = replaced.fast_all
    try:
        os.environ[switch], replaced.fast_all = "1", torch.all
        yield
    finally:
        replaced.fast_all = fast
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
