"""A model's structure without its weights, so that PEFT itself can be asked what a configuration does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import init

from pytest_lora.inspection.base import logical_shape, quantization_of
from pytest_lora.inspection.survey import survey

if TYPE_CHECKING:
    from transformers import PretrainedConfig

META = torch.device("meta")
_BLANK = nn.Module().__dict__


def resolve_base(base: Any, task_type: str | None = None) -> nn.Module:
    """The base as a module: itself if it is one, else built on the meta device from its configuration.

    Args:
        base: A live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.
        task_type: PEFT task type that chooses the model class where the configuration names none.

    Raises:
        TypeError: ``base`` is none of these.
        ValueError: The path or the configuration cannot be used; the message names what is wrong.
    """
    from transformers import PretrainedConfig

    if isinstance(base, nn.Module):
        found = survey(base)
        return base if found.carries_adapter else found.root
    if isinstance(base, (str, os.PathLike)):
        base = read_config(Path(base))
    if isinstance(base, PretrainedConfig):
        return build_on_meta(base, task_type)
    raise TypeError(
        "base must be a torch.nn.Module, a transformers PretrainedConfig or the path of a model folder or "
        f"config.json, not {type(base).__name__}"
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


def read_config(path: Path) -> PretrainedConfig:
    """Read a ``config.json`` (or the one in a folder) from disk; nothing is fetched or executed."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"base: {file} does not exist; give a model folder, a config.json, or a live model")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(file),
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"base: {file} is not a configuration that transformers can read: {error}"
        ) from error
    return config


def build_on_meta(config: PretrainedConfig, task_type: str | None = None) -> nn.Module:
    """Build the model that a configuration describes without weights."""
    config = copy.deepcopy(config)
    build = _builder(config, task_type)
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
    import transformers

    for name in config.architectures or ():
        if isinstance(known := getattr(transformers, name, None), type):
            return known
    for auto in _auto_classes(config, task_type):
        if type(config) in auto._model_mapping:
            return auto.from_config
    raise ValueError(
        f"base: transformers knows no model class for {type(config).__name__}; give a live model, or set "
        "architectures in the configuration"
    )


def _auto_classes(config: PretrainedConfig, task_type: str | None) -> list[Any]:
    import transformers

    by_task = {
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    }
    seq2seq = getattr(config, "is_encoder_decoder", False)
    usual = ["AutoModelForMaskedLM", "AutoModelForCausalLM"]
    if seq2seq:
        usual = ["AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"]
    names = [by_task.get(task_type or ""), *usual, "AutoModelForImageTextToText", "AutoModel"]
    return [getattr(transformers, name) for name in names if name and hasattr(transformers, name)]


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model's structure on the meta device; nothing of the original is shared that PEFT changes.

    Weights become meta tensors of their logical shape, shared where they were shared; layers quantized by
    bitsandbytes become ``nn.Linear`` of their logical shape; hooks stay behind.
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

    def copy(self, module: nn.Module) -> nn.Module:
        known = self.modules.get(id(module))
        if known is None:
            known = self.modules[id(module)] = self._plain_linear(module) or self._shallow(module)
        return known

    def _plain_linear(self, module: nn.Module) -> nn.Module | None:
        if quantization_of(module) not in ("4bit", "8bit"):
            return None
        inputs, outputs = logical_shape(module) or (0, 0)
        linear = nn.Linear(inputs, outputs, bias=module.bias is not None, device=META)
        return linear.requires_grad_(False).train(module.training)

    def _shallow(self, module: nn.Module) -> nn.Module:
        clone = nn.Module.__new__(_own_class(module))
        state = {**module.__dict__, **copy.deepcopy(_BLANK), "training": module.training}
        state["_parameters"] = {n: self._tensor(p) for n, p in module._parameters.items()}
        state["_buffers"] = {n: self._tensor(b) for n, b in module._buffers.items()}
        state["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        if "config" in state:
            state["config"] = copy.copy(state["config"])
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
