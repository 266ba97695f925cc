"""Heads for a task, which are new where a base was trained for another, as facts."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.base import TaskHead

HEADED = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Regression|RewardModel)")
"""Transformers classes that put a newly made task head on a pretrained body."""

SCALAR_HEADS = ("v_head", "value_head", "reward_head", "score", "rm_head", "scalar_head")
"""What reward and value models of one's own call the layer that makes one number of a hidden state (TRL's and
OpenRLHF's among them)."""


def task_heads(
    root: nn.Module, modules: dict[str, nn.Module], shaped: set[str], output: str | None
) -> Iterator[TaskHead]:
    """The heads of a base: of transformers' classes for a task, and of reward and value models by their names.

    Args:
        root: The base.
        modules: Its modules by name.
        shaped: Names of those that take and give a number of features.
        output: Name of its output embeddings, or None.
    """
    body = getattr(root, "base_model_prefix", "")
    headed = bool(HEADED.search(type(root).__name__))
    std = getattr(getattr(root, "config", None), "initializer_range", 0.02)
    for name in [n for n in modules if n and "." not in n and n not in (body, output)]:
        named = {n: m for n, m in modules.items() if n == name or n.startswith(f"{name}.")}
        inside, linear = [*named.values()], [m for n, m in named.items() if n in shaped]
        if headed and linear:
            fresh = _all_fresh(linear, std)
            if fresh is False and not any(_has_bias(module) for module in linear):
                fresh = _is_as_its_class_makes_it(root, name, inside, std)
            yield TaskHead(name, fresh)
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
    weight = module.weight  # of numbers, as _is_fresh has read it
    values, bound = weight.detach().float(), 1 / math.sqrt(weight.shape[-1])
    rounded = 1 + torch.finfo(weight.dtype).eps
    near = abs(float(values.std()) - bound / math.sqrt(3)) <= 5 * bound / math.sqrt(weight.numel())
    return float(values.abs().max()) <= bound * rounded and near


def _is_as_its_class_makes_it(root: nn.Module, name: str, inside: list[nn.Module], std: float) -> bool:
    """Whether a head of linear layers looks like one that its class initialises, where that draws other numbers.

    T5 draws with ``initializer_factor * d_model**-0.5``, BART with ``init_std``.
    """
    weighted = [module for module in inside if module._parameters]
    if not all(isinstance(module, nn.Linear) for module in weighted):
        return False  # an embedding or a tower that stands beside the body
    copies: dict[int, Any] = {}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _initialise(root, name, _emptied(inside[0], copies))
    except Exception:  # whatever a class asks for that its head alone does not have
        return False
    made = [copies[id(module)] for module in weighted]
    if _all_fresh(made, std):
        return False  # it draws what was looked for already
    return all(_are_alike(*pair) for pair in zip(weighted, made, strict=True))


def _emptied(module: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """A copy that holds zeros and shares no tensor; ``copies`` gets that of each part, by the ``id`` of the part."""
    own = copies[id(module)] = copy.copy(module)
    own.__dict__.update(
        _buffers={},
        _parameters={
            n: p if p is None else nn.Parameter(torch.zeros(p.shape)) for n, p in module._parameters.items()
        },
        _modules={n: m if m is None else _emptied(m, copies) for n, m in module._modules.items()},
    )
    return own


def _initialise(root: Any, name: str, head: nn.Module) -> None:
    """Let a model initialise a head as transformers does: its modules first, then the model that it is in."""
    around = copy.copy(root)
    around.__dict__.update(_parameters={}, _buffers={}, _modules={name: head})
    for module in (*reversed(list(head.modules())), around):
        root._init_weights(module)


def _are_alike(module: Any, made: Any) -> bool:
    """Whether two samples of n numbers have one deviation: their difference scatters by ``std / sqrt(n)``."""
    std = float(made.weight.detach().std())
    return abs(float(module.weight.detach().float().std()) - std) <= 5 * std / math.sqrt(made.weight.numel())


def _all_fresh(modules: list[nn.Module], std: float) -> bool | None:
    verdicts = [_is_fresh(module, std) for module in modules]
    return None if None in verdicts else all(verdicts)


def _has_bias(module: nn.Module) -> bool:
    bias = getattr(module, "bias", None)
    return isinstance(bias, torch.Tensor) and bias.device.type != "meta" and bool(bias.detach().any())


def _is_fresh(module: nn.Module, std: float) -> bool | None:
    """Whether weights still look like ``N(0, std)`` with a zero bias, as transformers initialises heads.

    The sample deviation of n normal numbers scatters by ``std / sqrt(2 n)``; five of these are allowed.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta" or not weight.is_floating_point():
        return None
    if _has_bias(module):
        return False
    deviation = float(weight.detach().float().std())
    return abs(deviation - std) <= 5 * std / math.sqrt(2 * weight.numel())
