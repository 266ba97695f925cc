"""What trains an adapter, as facts; and the learning rate of a trial, where the user gives none."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pytest_lora.facts.model_parts import LayerState
from pytest_lora.facts.optimizer import GroupFacts, Misshapen, Missing, OptimizerFacts, Part, ScheduleFacts
from pytest_lora.inspection.base import dtype_name
from pytest_lora.inspection.layers import UNREAD, read_values
from pytest_lora.inspection.peft_internals import (
    active_adapters,
    adapter_names,
    factors,
    further_tensors,
    token_rows,
)
from pytest_lora.inspection.peft_state import allocation_begins
from pytest_lora.inspection.survey import Survey, survey

HORIZON = (*range(65), *(2**n for n in range(7, 21)))
"""Steps at which a schedule that is a function of the step is looked at beforehand."""

USUAL_MODULES = 10
USUAL_STRENGTH = 2 * math.sqrt(8)
"""Scaling 2 at rank 8."""

RATE = 1e-2
"""Measured on tiny Llama, GPT-2, T5, BERT and the built-in base, ranks 1 to 64: of 1e-3, 3e-3, 1e-2 and 3e-2 the one
whose smallest drop in 20 steps is the largest (3 %)."""

LOWEST = RATE / 100
"""Where very many modules or a huge scaling ask for less. Adam moves each number by about the rate a step: twenty steps
of this move the numbers of ``lora_A``, which PEFT draws at about 0.02 for a width of 1,000, by a tenth."""


class Owned(NamedTuple):
    """Where a parameter belongs."""

    module: str
    adapter: str
    part: Part
    active: bool


def parameter_parts(found: Survey) -> dict[int, Owned]:
    """What each parameter of the adapters is, by id."""
    owned: dict[int, Owned] = {}
    for module, layer in found.lora.items():
        active = active_adapters(layer)
        for adapter in adapter_names(layer):
            pair = factors(layer, adapter)
            owned[id(pair.a)] = Owned(module, adapter, "a", adapter in active)
            owned[id(pair.b)] = Owned(module, adapter, "b", adapter in active)
            for _, parameter in further_tensors(layer, adapter):
                owned[id(parameter)] = Owned(module, adapter, "further", adapter in active)
            for factor in (layer.lora_A, layer.lora_B):
                bias = getattr(factor[adapter], "bias", None) if adapter in factor else None
                if isinstance(bias, Tensor):
                    owned[id(bias)] = Owned(module, adapter, "bias", adapter in active)
    for module, wrapper in found.saved.items():
        active = active_adapters(wrapper)
        for adapter, copied in wrapper.modules_to_save.items():
            for parameter in copied.parameters():
                owned.setdefault(id(parameter), Owned(module, adapter, "saved", adapter in active))
    for module, tokens in found.tokens.items():
        for adapter, rows in token_rows(tokens).items():
            owned[id(rows)] = Owned(module, adapter, "rows", True)
    return owned


def part_of(name: str, parameter: Tensor, owned: dict[int, Owned]) -> Part:
    """What a parameter is; a trainable bias of the base counts as one that is meant."""
    known = owned.get(id(parameter))
    if known:
        return known.part
    return "bias" if parameter.requires_grad and name.rpartition(".")[2] == "bias" else "base"


def optimizer_facts(model: nn.Module, optimizer: Optimizer) -> OptimizerFacts:
    """Compare, by identity, what an optimizer holds with what a model trains.

    Raises:
        TypeError: ``optimizer`` has no ``param_groups``.
    """
    groups = param_groups(optimizer)
    found = survey(model)
    owned = parameter_parts(found)
    times = Counter(id(p) for group in groups for p in group["params"])
    holds = set(times)
    own = {id(p): (n, p) for n, p in model.named_parameters()}
    trainable = {n: p for n, p in own.values() if p.requires_grad}
    return OptimizerFacts(
        optimizer=type(getattr(optimizer, "optimizer", optimizer)).__name__,
        held=tuple(n for n, p in trainable.items() if id(p) in holds),
        missing=tuple(
            Missing(n, part_of(n, p, owned))
            for n, p in trainable.items()
            if id(p) not in holds and (id(p) not in owned or owned[id(p)].active)
        ),
        frozen=sum(1 for i, (_, p) in own.items() if i in holds and not p.requires_grad),
        foreign=len(holds - own.keys()),
        groups=tuple(_group(i, g, own, owned, _floor(optimizer, g)) for i, g in enumerate(groups)),
        doubled=tuple(n for n, p in trainable.items() if times[id(p)] > 1),
        allocation_begins=allocation_begins(model, found.lora.values()),
        **_state(optimizer, {n: p for n, p in trainable.items() if id(p) in holds}, owned),
    )


def _state(optimizer: Any, held: dict[str, nn.Parameter], owned: dict[int, Owned]) -> dict[str, Any]:
    """What the state of an optimizer says of the parameters that it is kept for."""
    known = getattr(optimizer, "state", None)
    states = {name: known.get(p, {}) for name, p in held.items()} if isinstance(known, Mapping) else {}
    averages = {name: average for name, state in states.items() if (average := _average(state)) is not None}
    steps = {name: int(as_float(state["step"])) for name, state in states.items() if "step" in state}
    suspects = {
        name: (held[name], average)
        for name, average in averages.items()
        if steps.get(name, 0) > 1
        and id(held[name]) in owned
        and owned[id(held[name])].part in ("a", "b")
        and ".lora_E." not in name  # AdaLoRA sets singular values to zero between two steps
    }
    values = read_values(tensor for pair in suspects.values() for tensor in pair)
    return {
        "steps": max(steps.values(), default=0),
        "misshapen": tuple(
            Misshapen(name, tuple(held[name].shape), tuple(average.shape))
            for name, average in averages.items()
            # Averages of a projected gradient (GaLore, APOLLO) have the projector beside them.
            if average.shape != held[name].shape and "projector" not in states[name]
        ),
        "unmoved": tuple(
            name
            for name, (p, average) in suspects.items()
            if values.get(id(p), UNREAD).zero and values.get(id(average), UNREAD).zero is False
        ),
    }


def _average(state: Mapping[str, Any]) -> Tensor | None:
    """The running average of gradients, where it is kept as numbers of the parameter's shape."""
    average = state.get("exp_avg")
    return average if isinstance(average, Tensor) and average.is_floating_point() else None


def param_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer.

    Raises:
        TypeError: It has none.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    return groups


def group_numbers(groups: list[dict[str, Any]]) -> dict[int, int]:
    """In which group a parameter is, by its id."""
    return {id(p): number for number, group in enumerate(groups) for p in group["params"]}


def _group(
    index: int,
    group: dict[str, Any],
    own: dict[int, tuple[str, nn.Parameter]],
    owned: dict[int, Owned],
    floor: float | None,
) -> GroupFacts:
    held = [own[id(p)] for p in group["params"] if id(p) in own and p.requires_grad]
    return GroupFacts(
        index=index,
        lr=as_float(group.get("lr")),
        initial_lr=as_float(group["initial_lr"]) if "initial_lr" in group else None,
        weight_decay=as_float(group.get("weight_decay")),
        eps=as_float(group["eps"]) if isinstance(group.get("eps"), (int, float)) else None,
        parts=tuple(dict.fromkeys(part_of(n, p, owned) for n, p in held)),
        dtypes=tuple(dict.fromkeys(dtype_name(p.dtype) for _, p in held)),
        floor=floor,
    )


def _floor(optimizer: Any, group: dict[str, Any]) -> float | None:
    """The least size of a parameter that an Adafactor scales its rate by; that of torch always does."""
    made = type(getattr(optimizer, "optimizer", optimizer))
    eps: Any = group.get("eps")
    known = made.__name__ == "Adafactor" and isinstance(eps, (tuple, list)) and len(eps) == 2
    return float(eps[1]) if known and group.get("scale_parameter", "beta2_decay" in group) else None


def as_float(value: Any) -> float:
    """A number of a parameter group, which may be a tensor; NaN where the optimizer chooses it itself."""
    return float("nan") if value is None else float(value)


def schedule_facts(scheduler: Any, optimizer: Any) -> ScheduleFacts:
    """A schedule; one that is a function of the step is also looked at beforehand."""
    inner = getattr(scheduler, "scheduler", scheduler)
    rates = dict(_foreseen(inner))
    if len(rates) == 1:  # step 0 alone says nothing of the later ones
        rates.clear()
    ends = None
    for step in sorted(rates, reverse=True):
        if rates[step] > 0:
            break
        ends = step
    peak = max(rates.values(), default=None)
    reached = min((step for step, rate in rates.items() if peak and rate == peak), default=0)
    return ScheduleFacts(
        schedule=type(inner).__name__,
        steps_taken=int(getattr(inner, "last_epoch", 0)),
        peak=peak,
        not_before=max((step for step in rates if step < reached), default=None),
        ends=ends,
        warm_up=_stated(inner, "num_warmup_steps"),
        planned=_stated(inner, "num_training_steps"),
        drives=_drives(inner, optimizer),
        call=_call(type(inner), inner),
    )


def _call(made: type, scheduler: Any) -> str | None:
    """The call of a schedule of torch that keeps what it was made with under the names of its arguments."""
    if made.__module__ != torch.optim.lr_scheduler.__name__:
        return None
    names = [name for name in inspect.signature(made).parameters if name not in ("optimizer", "last_epoch")]
    values = {name: getattr(scheduler, name, None) for name in names}
    if not all(isinstance(value, (int, float)) for value in values.values()):
        return None
    written = "".join(f", {name}={value!r}" for name, value in values.items())
    return f"{made.__module__}.{made.__name__}(optimizer{written})"


def _drives(scheduler: Any, optimizer: Any) -> bool:
    """Whether a schedule writes into the groups of an optimizer; True where that cannot be told."""
    theirs = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
    ours = getattr(optimizer, "param_groups", None)
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return True
    return not theirs or not ours or bool({id(g) for g in theirs} & {id(g) for g in ours})


def _stated(scheduler: Any, name: str) -> int | None:
    """What a schedule of transformers was made for: its functions of the step are partials with these names."""
    functions = getattr(scheduler, "lr_lambdas", None)
    known = [getattr(f, "keywords", {}).get(name) for f in functions or ()]
    return int(known[0]) if known and isinstance(known[0], (int, float)) else None


def _foreseen(scheduler: Any) -> Iterator[tuple[int, float]]:
    """Largest rate of any group at some steps, up to one at which the schedule raises; nothing where it is no function
    of the step."""
    functions = getattr(scheduler, "lr_lambdas", None)
    if not functions or type(scheduler).__name__ != "LambdaLR":
        return
    planned = _stated(scheduler, "num_training_steps")
    for step in sorted({*HORIZON, *([planned] if planned else [])}):
        try:
            rates = [rate * float(f(step)) for rate, f in zip(scheduler.base_lrs, functions, strict=True)]
        except Exception:  # whatever the user's function raises beyond the steps that it is made for
            return
        yield step, max(rates)


def default_optimizer(model: nn.Module, rate: float) -> Optimizer | None:
    """The optimizer that a probe makes where it is given none; None where nothing trains."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return AdamW(trainable, lr=rate) if trainable else None


def suitable_rate(layers: Sequence[LayerState]) -> float:
    """A learning rate for Adam at which some twenty steps move adapters far enough and not too far.

    A step of size ``lr`` in every number of ``lora_B`` changes the output of a module by about
    ``lr * scaling * sqrt(rank / 3)`` of the size of its input, whatever its width, and the changes of all modules add
    up. This is kept at what ``RATE`` gives ten modules of rank 8 and scaling 2; a 7B model with rank 16 on all its
    linear layers gets 3e-4.
    """
    strength = max((abs(layer.scaling) * math.sqrt(layer.rank) for layer in layers), default=0.0)
    if not strength:
        return RATE
    rate = RATE * (USUAL_STRENGTH / strength) * (USUAL_MODULES / len(layers))
    highest = 3 * RATE if strength < 1 else RATE
    return min(max(rate, LOWEST), highest)
