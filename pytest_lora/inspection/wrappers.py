"""Wrappers that reduce, shard or compile a model, and adapters that came after them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytest_lora.facts.model_parts import LateAdapter, Reducer, Shard, Wrappers
from pytest_lora.inspection.base import dtype_name, quantization_of
from pytest_lora.inspection.fsdp_internals import FLAT, HOLDS, Group, Held, groups
from pytest_lora.inspection.peft_internals import (
    BaseTuner,
    active_adapters,
    adapter_names,
    factors,
    further_tensors,
)
from pytest_lora.inspection.survey import Survey, every_module
from pytest_lora.inspection.transformers_internals import checkpoints_reentrant

_OTHER_INPUTS = re.compile(r"vision|visual|audio|image|video|encoder")
"""In names of modules that a batch of texts alone may not enter."""


def wrapper_facts(model: nn.Module, modules: Sequence[nn.Module], found: Survey) -> Wrappers:
    """What wraps a model, and how that fits what is adapted in it.

    Args:
        model: The model, with all that wraps it.
        modules: Its modules, as ``every_module`` gives them.
        found: What one walk over it found.
    """
    sharded = tuple(groups(modules))
    reducers = [module for module in modules if isinstance(module, DistributedDataParallel)]
    late = tuple(_late_adapters(model, sharded, reducers))
    if not sharded and not reducers:
        return Wrappers(late)
    names = {id(module): _clean(name) for name, module in model.named_modules()}
    outside = {id(tensor) for tensor in _outside_the_forward(found)}
    return Wrappers(
        late=late,
        reducers=tuple(_reducer(module, found, outside) for module in reducers),
        shards=tuple(_shard(group, names) for group in sharded),
        apart=tuple(_apart(found, sharded)),
        unseen=sum(_is_adapter(held, names) for group in sharded if group.ranks > 1 for held in group.held),
    )


def late_adapters(model: nn.Module) -> Iterator[LateAdapter]:
    """Adapters that were put in after something wrapped the model, so that the wrapper does not know them.

    DDP keeps a list of the parameters that it was made with, the first FSDP puts them into flat ones, the second makes
    them distributed tensors. Around a compiled model, PEFT saves keys with the name of the compiled one in them.
    """
    modules = tuple(every_module(model))
    reducers = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return _late_adapters(model, tuple(groups(modules)), reducers)


def _late_adapters(
    model: nn.Module, sharded: Sequence[Group], reducers: Iterable[DistributedDataParallel]
) -> Iterator[LateAdapter]:
    yield from _on_a_compiled_model(model)
    for module in reducers:
        known = _known_to_ddp(module)
        yield from _missed("DistributedDataParallel", (n for n, p in _adapters(module) if id(p) not in known))
    if not sharded:
        return
    places = {
        (id(place.module), place.name) for group in sharded for one in group.held for place in one.places
    }
    inside = {id(module) for group in sharded for module in group.owner.modules()}
    yield from _missed(
        "FSDP",
        (
            _clean(f"{path}.{name}")
            for path, module in model.named_modules()
            if id(module) in inside and "lora_" in path
            for name, parameter in module._parameters.items()
            if parameter is not None and name != FLAT and (id(module), name) not in places
        ),
    )


def _on_a_compiled_model(model: nn.Module) -> Iterator[LateAdapter]:
    above: nn.Module | None = model
    while above is not None and not isinstance(above, BaseTuner):
        above = next(above.children(), None)  # whatever wraps a model holds it first
    if isinstance(above, BaseTuner) and hasattr(above.model, "_orig_mod"):
        yield LateAdapter("torch.compile", tuple(n for n, _ in above.named_parameters() if "lora_" in n))


def _missed(wrapper: str, names: Iterable[str]) -> Iterator[LateAdapter]:
    missed = tuple(names)
    if missed:
        yield LateAdapter(wrapper, missed)


def _adapters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if "lora_" in name)


def _known_to_ddp(module: Any) -> set[int]:
    ignored = {id(p) for name, p in module.module.named_parameters() if name in module.parameters_to_ignore}
    return ignored | {id(p) for p in module._module_parameters}


def _reducer(module: Any, found: Survey, outside: set[int]) -> Reducer:
    buckets = module.reducer._get_zeros_like_grad_buckets()
    reduced = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    given = {id(p) for p in module._module_parameters}
    named = list(module.module.named_parameters())
    return Reducer(
        finds_unused=bool(module.find_unused_parameters),
        static_graph=bool(module.static_graph),
        unreduced=tuple(n for n, p in named if p.requires_grad and id(p) in given - reduced),
        idle=tuple(n for n, p in named if id(p) in reduced and (not p.requires_grad or id(p) in outside)),
        reentrant=any(map(checkpoints_reentrant, found.modules.values())),
        optional=any("expert" in name or _OTHER_INPUTS.search(name) for name in found.modules),
    )


def _outside_the_forward(found: Survey) -> Iterator[Tensor]:
    """What belongs to an adapter that takes no part in the forward pass."""
    for layer in found.lora.values():
        for adapter in set(adapter_names(layer)) - set(active_adapters(layer)):
            pair = factors(layer, adapter)
            yield from (pair.a, pair.b, *(tensor for _, tensor in further_tensors(layer, adapter)))
    for wrapper in found.saved.values():
        for adapter in set(wrapper.modules_to_save) - set(active_adapters(wrapper)):
            yield from wrapper.modules_to_save[adapter].parameters()


def _clean(name: str) -> str:
    return name.replace(f"{HOLDS}.", "").removesuffix(f".{HOLDS}").removesuffix(HOLDS)


def _shard(group: Group, names: dict[int, str]) -> Shard:
    packed = {
        one.dtype for one in group.held if quantization_of(one.places[0].module) == "4bit" and _packed(one)
    }
    numbers = {True: 0, False: 0}
    for one in group.held:
        numbers[one.trained] += math.prod(one.shape)
    return Shard(
        version=group.version,
        name=names.get(id(group.owner), ""),
        ranks=group.ranks,
        gathered_as="" if group.gathered_as is None else dtype_name(group.gathered_as),
        packed_as=tuple(sorted(dtype_name(dtype) for dtype in packed if dtype.is_floating_point)),
        trained_dtypes=tuple(sorted({dtype_name(one.dtype) for one in group.held if one.trained})),
        trained=numbers[True],
        frozen=numbers[False],
    )


def _packed(one: Held) -> bool:
    """Whether it is the packed weight of a 4-bit layer, not its bias: packed numbers stand in one column."""
    return one.places[0].name == "weight" and one.shape[-1:] == (1,)


def _is_adapter(one: Held, names: dict[int, str]) -> bool:
    return any("lora_" in f"{names.get(id(place.module), '')}.{place.name}" for place in one.places)


def _apart(found: Survey, sharded: tuple[Group, ...]) -> Iterator[str]:
    """Modules adapted by DoRA, which reads the base weight itself, whose base layer is gathered on its own."""
    alone = {id(inner) for group in sharded for inner in (group.owner, getattr(group.owner, HOLDS, None))}
    for module, layer in found.lora.items():
        if layer.lora_magnitude_vector and alone & {id(layer.base_layer), id(layer.get_base_layer())}:
            yield module
