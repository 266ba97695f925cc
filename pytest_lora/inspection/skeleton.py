"""A model's structure without its weights, so that PEFT itself can be asked what a configuration does."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import init

from pytest_lora.inspection.base import logical_shape, quantization_of, task_of
from pytest_lora.inspection.peft_internals import (
    BaseTunerLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    held_layer,
)
from pytest_lora.inspection.public_bases import config_by_name, is_name, read_config, with_other_classes
from pytest_lora.inspection.quiet import alone
from pytest_lora.inspection.survey import survey
from pytest_lora.values import require_path, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

META = torch.device("meta")
_BLANK = nn.Module().__dict__

PRETRAINED = re.compile(
    r"(ForCausalLM|LMHead(Model)?|ForMaskedLM|ForPreTraining|ForConditionalGeneration|Model)$"
)
"""Classes that a base is pretrained as, and that its ``config.json`` names whatever is built on it."""


def resolve_base(base: Any, task_type: str | None = None, saved: Collection[str] = ()) -> nn.Module:
    """The base as a module: itself if it is one, else built on the meta device from its configuration.

    Args:
        base: A live model, a ``PretrainedConfig``, the path of a model folder or ``config.json``, or the name of a
            public model.
        task_type: PEFT task type. It chooses the model class where the configuration names none, or one that a base
            is pretrained as: for ``"SEQ_CLS"`` a classifier is built on the ``config.json`` of a causal LM.
        saved: Names in ``modules_to_save``. Without a task type they choose the class: vision and audio have none, and
            ``config.json`` names a pretrained class that has no such head.

    Raises:
        TypeError: ``base`` is none of these.
        ValueError: The path or the configuration cannot be used; the message names what is wrong.
    """
    described = model_or_config(base)
    if isinstance(described, nn.Module):
        found = survey(described)
        return described if found.carries_adapter else found.root
    named = build_on_meta(described, task_type)
    for other in () if task_type is not None or _has(named, saved) else with_other_classes(described):
        with suppress(ValueError):
            if _has(built := build_on_meta(other), saved):
                return built
    return named


def _has(model: nn.Module, names: Collection[str]) -> bool:
    modules = [module for module, _ in model.named_modules()] if names else []
    return all(any(module.endswith(name) for module in modules) for name in names)


def model_or_config(base: Any) -> nn.Module | PretrainedConfig:
    """A base as it is given, a path as the configuration that lies there; see ``resolve_base``."""
    from transformers import PretrainedConfig

    if isinstance(base, (str, os.PathLike)):
        return named_or_read(base)
    if isinstance(base, (nn.Module, PretrainedConfig)):
        return base
    raise TypeError(
        "base must be a torch.nn.Module, a transformers PretrainedConfig, the path of a model folder or "
        f"config.json, or the name of a public model, not {shown(base)}"
    )


def require_no_adapter(model: nn.Module) -> None:
    """Refuse a base that carries an adapter.

    Raises:
        ValueError: It does.
    """
    if survey(model).carries_adapter:
        raise ValueError(
            f"base: this {type(model).__name__} carries an adapter already; give the model without it"
        )


def named_or_read(base: str | os.PathLike[str]) -> PretrainedConfig:
    """The configuration of a base that is given by a path or by its public name.

    Raises:
        ValueError: It cannot be found or read.
    """
    return config_by_name(str(base)) if is_name(base) else read_config(require_path("base", base))


def build_on_meta(
    config: PretrainedConfig, task_type: str | None = None, labels: int | None = None
) -> nn.Module:
    """Build the model that a configuration describes without weights.

    Args:
        config: The configuration; it is not changed.
        task_type: As for ``resolve_base``.
        labels: Classes of a head that the configuration says nothing of, as it names a pretrained class.
    """
    config = copy.deepcopy(config)
    build = _builder(config, task_type)
    if labels and builds_another_class(config, task_type):
        config.num_labels = labels
    try:
        with META, without_initial_values():
            model: nn.Module = build(config)
    except Exception as error:
        raise ValueError(
            f"base: transformers cannot build a {type(config).__name__} without weights: "
            f"{type(error).__name__}: {error}"
        ) from error
    return model


@contextmanager
def without_initial_values() -> Iterator[None]:
    """Leave tensors on the meta device as they are where a module initialises them, which takes long."""
    with alone:
        functions = {name: f for name, f in vars(init).items() if name.endswith("_") and callable(f)}
        try:
            for name, function in functions.items():
                setattr(init, name, _sparing_meta(function))
            yield
        finally:
            for name, function in functions.items():
                setattr(init, name, function)


def _sparing_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    def initialise(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else function(tensor, *args, **kwargs)

    return initialise


def _builder(config: PretrainedConfig, task_type: str | None) -> Any:
    named = _named_class(config)
    if named is not None and not builds_another_class(config, task_type):
        return named
    for auto in _auto_classes(config, task_type):
        if type(config) in auto._model_mapping:
            return auto.from_config
    raise ValueError(
        f"base: transformers knows no model class for {type(config).__name__}; give a live model, or set "
        "architectures in the configuration"
    )


def _named_class(config: PretrainedConfig) -> Any:
    """The class of transformers that a configuration names, or None."""
    import transformers

    named = (getattr(transformers, name, None) for name in config.architectures or ())
    return next((known for known in named if isinstance(known, type)), None)


def depends_on_task(config: PretrainedConfig, task_type: str | None) -> bool:
    """Whether another class is built for a task type than for none."""
    return task_type is not None and (_named_class(config) is None or builds_another_class(config, task_type))


def builds_another_class(config: PretrainedConfig, task_type: str | None) -> bool:
    """Whether a task type means another class than the pretrained one that a configuration names."""
    import transformers

    auto = getattr(transformers, BY_TASK.get(task_type or "", ""), None)
    named = _named_class(config)
    if named is None or auto is None or type(config) not in auto._model_mapping:
        return False
    architecture = named.__name__
    if not PRETRAINED.search(architecture):
        return False
    # Models of several kinds of input are tuned under these task types as they are.
    if task_type in ("CAUSAL_LM", "FEATURE_EXTRACTION") and architecture.endswith("ForConditionalGeneration"):
        return False
    return task_of(architecture, config) != task_type


BY_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of transformers that loads a base for each task type of PEFT."""


def _auto_classes(config: PretrainedConfig, task_type: str | None) -> list[Any]:
    import transformers

    seq2seq = getattr(config, "is_encoder_decoder", False)
    usual = ["AutoModelForMaskedLM", "AutoModelForCausalLM"]
    if seq2seq:
        usual = ["AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"]
    names = [BY_TASK.get(task_type or ""), *usual, "AutoModelForImageTextToText", "AutoModel"]
    return [getattr(transformers, name) for name in names if name and hasattr(transformers, name)]


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model's structure on the meta device; nothing of the original is shared that PEFT changes.

    Weights become meta tensors of their logical shape, shared where they were shared; layers quantized by
    bitsandbytes become ``nn.Linear`` of their logical shape; hooks stay behind, and so do the adapters of PEFT.
    """
    return _Copier().copy(model)


def _own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without what ``fully_shard`` puts before it (``torch.distributed.fsdp.FSDPModule``)."""
    kinds: Any = type(module).__mro__
    own: type[nn.Module] = kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]
    return own


class _Copier:
    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.configs: dict[int, Any] = {}

    def copy(self, module: nn.Module) -> nn.Module:
        known = self.modules.get(id(module))
        inner: Any = None
        if isinstance(module, BaseTunerLayer):
            inner = held_layer(module)
        elif isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            inner = module.original_module
        if inner is not None:
            return self.copy(inner)
        if isinstance(module, torch.jit.ScriptModule):
            return self._opaque(module)
        if known is None:
            known = self.modules[id(module)] = self._plain_linear(module) or self._shallow(module)
        return known

    def _plain_linear(self, module: nn.Module) -> nn.Module | None:
        if quantization_of(module) not in ("4bit", "8bit"):
            return None
        inputs, outputs = logical_shape(module) or (0, 0)
        linear = nn.Linear(inputs, outputs, bias=module.bias is not None, device=META)
        return linear.requires_grad_(False).train(module.training)

    def _opaque(self, module: nn.Module) -> nn.Module:
        """What holds the parameters of a compiled module, whose code cannot be taken to another device."""
        made = nn.Module()
        for name, parameter in module.named_parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=META)
            held = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            made.register_parameter(name.replace(".", "_"), held)
        return made

    def _shallow(self, module: nn.Module) -> nn.Module:
        clone = nn.Module.__new__(_own_class(module))
        state = {**module.__dict__, **copy.deepcopy(_BLANK), "training": module.training}
        state["_parameters"] = {n: self._tensor(p) for n, p in module._parameters.items()}
        state["_buffers"] = {n: self._tensor(b) for n, b in module._buffers.items()}
        state["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        if quantization_of(module) == "hqq":
            beside = state.get("meta") or {}  # scales, with which it dequantizes
            state["meta"] = {
                n: self._tensor(t) if isinstance(t, torch.Tensor) else t for n, t in beside.items()
            }
            state["device"] = META
        if "config" in state:  # modules that share theirs go on to
            own = state["config"]
            state["config"] = self.configs.setdefault(id(own), copy.copy(own))
        state.pop("peft_config", None)
        clone.__dict__ = state
        state["_modules"] = {n: c if c is None else self.copy(c) for n, c in module._modules.items()}
        return clone

    def _tensor(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self.tensors:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            self.tensors[id(tensor)] = empty
        return self.tensors[id(tensor)]
