"""Heads for a task, which are new where a base was trained for another, as facts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.base import TaskHead
from pytest_lora.inspection.shapes import logical_shape

HEADED = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Regression|RewardModel)")
"""Transformers classes that put a newly made task head on a pretrained body."""

SCALAR_HEADS = ("v_head", "value_head", "reward_head", "score", "rm_head", "scalar_head")
"""What reward and value models of one's own call the layer that makes one number of a hidden state (TRL's and
OpenRLHF's among them)."""


def task_heads(root: nn.Module, modules: dict[str, nn.Module], output: str | None) -> Iterator[TaskHead]:
    """The heads of a base: of transformers' classes for a task, and of reward and value models by their names."""
    body = getattr(root, "base_model_prefix", "")
    headed = bool(HEADED.search(type(root).__name__))
    std = getattr(getattr(root, "config", None), "initializer_range", 0.02)
    for name in [n for n in modules if n and "." not in n and n not in (body, output)]:
        inside = [m for n, m in modules.items() if n == name or n.startswith(f"{name}.")]
        linear = [m for m in inside if logical_shape(m)]
        if headed and linear:
            yield TaskHead(name, _all_fresh(linear, std))
        elif (
            not headed
            and name in SCALAR_HEADS
            and _gives_one_number(linear)
            and not _is_unfrozen(root, linear)
        ):
            fresh = _all_fresh(linear, std)
            if fresh is False:
                fresh = all(_is_as_torch_makes_it(module) for module in linear)
            yield TaskHead(name, fresh)


def _gives_one_number(linear: list[nn.Module]) -> bool:
    return bool(linear) and getattr(linear[-1], "out_features", None) == 1


def _is_unfrozen(root: nn.Module, linear: list[nn.Module]) -> bool:
    """Whether a head was set to train by hand, in a model of which something is frozen."""
    trains = any(p.requires_grad for module in linear for p in module.parameters())
    return trains and not all(p.requires_grad for p in root.parameters())


def _is_as_torch_makes_it(module: Any) -> bool:
    """Whether weights look like torch's own initialisation, which is uniform up to ``1 / sqrt(inputs)``.

    Of training the numbers next to that bound tell first: they pass it.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta" or not weight.is_floating_point():
        return False
    values, bound = weight.detach().float(), 1 / math.sqrt(weight.shape[-1])
    rounded = 1 + torch.finfo(weight.dtype).eps
    near = abs(float(values.std()) - bound / math.sqrt(3)) <= 5 * bound / math.sqrt(weight.numel())
    return float(values.abs().max()) <= bound * rounded and near


def _all_fresh(modules: list[nn.Module], std: float) -> bool | None:
    verdicts = [_is_fresh(module, std) for module in modules]
    return None if None in verdicts else all(verdicts)


def _is_fresh(module: nn.Module, std: float) -> bool | None:
    """Whether weights still look like ``N(0, std)`` with a zero bias, as transformers initialises heads.

    The sample deviation of n normal numbers scatters by ``std / sqrt(2 n)``; five of these are allowed.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta" or not weight.is_floating_point():
        return None
    if isinstance(bias, torch.Tensor) and bool(bias.detach().any()):
        return False
    deviation = float(weight.detach().float().std())
    return abs(deviation - std) <= 5 * std / math.sqrt(2 * weight.numel())
