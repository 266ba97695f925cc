"""The only place that touches what FSDP, the first and the second, does not document as public."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from pytest_lora.inspection.survey import every_module

HOLDS = "_fsdp_wrapped_module"
"""What the first FSDP calls the module that it wraps; a part of every name below it."""


FLAT = "_flat_param"
"""Where the first FSDP registers a flat parameter, unless it shows the original ones."""


class Place(NamedTuple):
    """Where a model holds a parameter."""

    module: nn.Module
    name: str


class Held(NamedTuple):
    """A parameter of a group, as it is when it is whole.

    Attributes:
        places: Where the model holds it, tied ones at several places.
        shape: Its whole shape.
        dtype: Its dtype while it is divided.
        trained: Whether it requires gradients.
        known: Tensors by which it is known at one time or another.
    """

    places: tuple[Place, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    known: tuple[torch.Tensor, ...]


class Group(NamedTuple):
    """Parameters that are gathered together.

    Attributes:
        version: 1 or 2.
        owner: The module whose forward gathers them.
        ranks: Processes that they are divided among.
        gathered_as: Dtype in which they are gathered, where the policy of mixed precision sets one.
        held: The parameters.
    """

    version: int
    owner: nn.Module
    ranks: int
    gathered_as: torch.dtype | None
    held: tuple[Held, ...]


def groups(modules: Iterable[nn.Module]) -> Iterator[Group]:
    """The groups of both kinds of FSDP among the modules of a model, in their order."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in modules:
        if isinstance(module, fsdp.FullyShardedDataParallel):
            handle = getattr(module, "_handle", None)
            if handle is not None:
                yield _flat(module, handle)
        elif isinstance(module, fsdp.FSDPModule):
            state: Any = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group is not None and group.fsdp_params:
                    yield _distributed(module, group)


def is_divided(model: nn.Module) -> bool:
    """Whether FSDP divides weights of a model among ranks, so that this process has no whole values or gradients."""
    return any(group.ranks > 1 for group in groups(every_module(model)))


def _flat(owner: nn.Module, handle: Any) -> Group:
    flat = handle.flat_param
    own = flat._params or (None,) * len(flat._param_infos)
    tied: dict[tuple[int, str], list[Place]] = {}
    for shared in flat._shared_param_infos:
        first = id(shared.prim_module), shared.prim_param_name
        tied.setdefault(first, []).append(Place(shared.module, shared.param_name))
    held = []
    for info, shape, parameter in zip(flat._param_infos, flat._shapes, own, strict=True):
        places = (Place(info.module, info.param_name), *tied.get((id(info.module), info.param_name), ()))
        trained = (flat if parameter is None else parameter).requires_grad
        known = (flat,) if parameter is None else (flat, parameter)
        held.append(Held(places, tuple(shape), handle._orig_param_dtype, trained, known))
    lowered = handle._low_prec_param_dtype_specified
    gathered = handle._fwd_bwd_param_dtype if lowered else None
    return Group(1, owner, handle.world_size if handle.uses_sharded_strategy else 1, gathered, tuple(held))


def _distributed(owner: nn.Module, group: Any) -> Group:
    held = []
    for one in group.fsdp_params:
        info, sharded = one._module_info, one.sharded_param
        shared = zip(info.shared_modules, info.shared_param_names, strict=True)
        places = (Place(info.module, info.param_name), *(Place(*pair) for pair in shared))
        whole = getattr(one, "_unsharded_param", None)
        known = (sharded,) if whole is None else (sharded, whole)
        held.append(Held(places, tuple(one._orig_size), sharded.dtype, sharded.requires_grad, known))
    mesh = group.mesh_info
    return Group(2, owner, getattr(mesh, "shard_mesh_size", 1), group.mp_policy.param_dtype, tuple(held))


@contextmanager
def whole_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Parameters of the first FSDP at their places with their whole shapes, for the time being.

    It leaves a part in one dimension there, or what is no parameter. Where one process has the numbers they are
    there; else the stand-in is on the meta device, which has none. Of the second, what is divided is there also where
    a forward has left what was gathered, in the dtype of its policy.
    """
    put_back: list[tuple[dict[str, Any], str, Any]] = []
    missing = object()

    def put(where: dict[str, Any], name: str, value: Any) -> None:
        put_back.append((where, name, where.get(name, missing)))
        where[name] = value

    try:
        for group in groups(modules):
            if group.version == 1:
                _stand_in(group, put)
            else:
                _divided_again(group, put)
        yield
    finally:
        for where, name, value in reversed(put_back):
            if value is missing:
                del where[name]
            else:
                where[name] = value


def _divided_again(group: Group, put: Any) -> None:
    for held in group.held:
        for place in held.places:
            if place.module._parameters.get(place.name) is not held.known[0]:
                put(place.module._parameters, place.name, held.known[0])


def _stand_in(group: Group, put: Any) -> None:
    flat = group.held[0].known[0]
    for module in (group.owner, getattr(group.owner, HOLDS, None)):
        if module is not None and FLAT in module._parameters:
            put(module._parameters, FLAT, None)
    for held, values in zip(group.held, _values(group, flat), strict=True):
        at = held.places[0]
        there = at.module._parameters.get(at.name)
        own = any(there is one for one in held.known) and values is not None
        if own and there is not None and (tuple(there.shape), there.dtype) == (held.shape, held.dtype):
            continue  # as it would be without FSDP
        data = torch.empty(held.shape, dtype=held.dtype, device="meta") if values is None else values
        stand_in = nn.Parameter(data, requires_grad=held.trained)
        for place in held.places:
            put(place.module._parameters, place.name, stand_in)
            if place.name in vars(place.module):
                put(vars(place.module), place.name, stand_in)


def _values(group: Group, flat: Any) -> list[torch.Tensor] | list[None]:
    """The whole numbers of each parameter of a flat one, where this process has them."""
    held = flat if getattr(flat, "_local_shard", None) is None else flat._local_shard
    if group.ranks > 1 or held.dtype != group.held[0].dtype or held.numel() != sum(flat._numels_with_padding):
        return [None] * len(group.held)
    parts = torch.split(held.detach(), flat._numels_with_padding)
    kept = [part for part, padding in zip(parts, flat._is_padding_mask, strict=True) if not padding]
    return [part.view(one.shape) for part, one in zip(kept, group.held, strict=True)]
