"""Bases on the meta device without inner layers, kept where a search asks for one adapter after another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.limited.patterns import require_matchable
from pytest_lora.inspection.memory.layer_stacks import (
    Cut,
    LayerList,
    Run,
    Stack,
    is_numbered,
    layer_lists,
    marks,
    runs_of,
    same_in_every_layer,
    take_out,
)
from pytest_lora.inspection.memory.parallel import plan_of
from pytest_lora.inspection.skeleton import require_no_adapter, resolve_base, skeleton

if TYPE_CHECKING:
    from peft import LoraConfig

_MOST = 16
"""Bases that are kept, of three to five layers each; then all are forgotten."""


@dataclass(frozen=True)
class CutBase:
    """A base on the meta device without the layers that are like others, and what it was with them.

    Attributes:
        model, stacks: The base and its cut stacks.
        layers: Lists of layers of the whole base.
        modules: Names of all its modules.
        runs: The layers that were cut.
        plan: See ``MetaModel``; it is of the whole base.
    """

    model: nn.Module
    stacks: list[Stack]
    layers: list[LayerList]
    modules: list[str]
    runs: tuple[Run, ...]
    plan: dict[str, int] | None = None


class KeptBases:
    """Cut bases of one configuration: from the second time on that one is asked for, copies of it are given."""

    def __init__(self) -> None:
        self._whole: dict[Hashable, tuple[list[LayerList], list[str]]] = {}
        self._asked: dict[Hashable, CutBase | None] = {}

    def base(
        self,
        key: Hashable,
        runs_in: Callable[[list[LayerList], list[str]], tuple[Run, ...]],
        make: Callable[[], CutBase],
    ) -> CutBase:
        """A base that is the caller's own.

        Args:
            key: What tells one base from another before it is cut, and how it is cut.
            runs_in: The runs that the adapter leaves alike, given the layers and modules of the whole base.
            make: Builds the base.
        """
        if key in self._whole:
            known = self._asked.get((key, runs_in(*self._whole[key])))
            if known is not None:
                return _copy(known)
        made = make()
        if len(self._asked) >= _MOST:
            self._asked.clear()
            self._whole.clear()
        self._whole[key] = made.layers, made.modules
        asked = key, made.runs
        if asked not in self._asked:  # most are asked for once
            self._asked[asked] = None
            return made
        self._asked[asked] = made
        return _copy(made)


@lru_cache(maxsize=8)
def kept_for(base: Hashable) -> KeptBases:
    """What all adapters of one base share, by what tells it from other bases."""
    return KeptBases()


def _copy(cut: CutBase) -> CutBase:
    model, stacks = copy.deepcopy((cut.model, cut.stacks))
    return CutBase(model, stacks, cut.layers, cut.modules, cut.runs)


def cut_base(
    base: Any, config: LoraConfig, setting: StepSetting, cut: Cut, kept: KeptBases | None = None
) -> CutBase:
    """A base without the layers that the adapter leaves like their neighbours, neither quantized nor adapted.

    Raises:
        TypeError, ValueError: See ``meta_model.build``.
    """
    from transformers import PretrainedConfig

    task = getattr(config.task_type, "value", config.task_type)
    if setting.trainer == "trl-reward" and isinstance(base, PretrainedConfig):
        base, task = _scoring(base), "SEQ_CLS"

    def runs_in(layers: list[LayerList], modules: list[str]) -> tuple[Run, ...]:
        return _runs_in(layers, modules, config, setting, cut)

    def made() -> CutBase:
        model = _whole(base, task, setting)
        layers, modules = layer_lists(model), [name for name, _ in model.named_modules()]
        runs, plan = runs_in(layers, modules), plan_of(model, setting)
        return CutBase(model, take_out(model, runs, cut), layers, modules, runs, plan)

    if kept is None or setting.parallel is not None:
        return made()
    return kept.base((task, setting.trainer == "trl-reward", setting.dtype, cut), runs_in, made)


def _whole(base: Any, task: str | None, setting: StepSetting) -> nn.Module:
    from transformers import PreTrainedModel

    dtype: torch.dtype = getattr(torch, setting.dtype)
    with _default_dtype(dtype):
        model = resolve_base(base, task)
    if isinstance(base, nn.Module):
        require_no_adapter(model)
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"base: a step can be run of transformers models, not of a {type(model).__name__}"
            )
        model = _in_dtype(skeleton(model), dtype)
    _complete(model)
    return model


def _scoring(base: Any) -> Any:
    """The configuration of a model with one number as its output, which TRL builds to learn rewards."""
    scoring = copy.deepcopy(base)
    scoring.architectures = None
    scoring.id2label = {0: "LABEL_0"}
    scoring.label2id = {"LABEL_0": 0}
    return scoring


def _complete(model: nn.Module) -> None:
    """Give a configuration the token numbers that every training sets; which number it is does not matter."""
    transformer: Any = model
    for name in ("pad_token_id", "image_token_id", "image_token_index"):
        if getattr(transformer.config, name, "absent") is None:
            setattr(transformer.config, name, 0)


def _runs_in(
    layers: list[LayerList], modules: list[str], config: LoraConfig, setting: StepSetting, cut: Cut
) -> tuple[Run, ...]:
    """The runs of layers that are adapted like their neighbours."""
    mark = marks(config) if cut.together else None
    if mark is None or any(map(is_numbered, setting.frozen)):
        return ()
    if same_in_every_layer(config):
        return runs_of(layers, cut)
    require_matchable(config, modules)
    return runs_of(layers, cut, mark)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model
