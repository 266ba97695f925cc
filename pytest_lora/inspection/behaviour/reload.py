"""An adapter saved and loaded again, on copies of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from pytest_lora.facts.behaviour import ReloadFacts
from pytest_lora.facts.settings import rewriter
from pytest_lora.findings import grouped
from pytest_lora.inspection.behaviour import (
    adapted_copy,
    as_module,
    base_without_adapter,
    copy_of,
    distance,
    identical,
    largest,
    lora_layers,
    output_of,
    quiet_eval,
    watched_output,
)
from pytest_lora.inspection.bitsandbytes_internals import pack_for_cpu, was_packed_for_cpu
from pytest_lora.inspection.model import adapted_survey
from pytest_lora.inspection.peft_internals import (
    WRAPPERS,
    BaseTunerLayer,
    active_adapters,
    adapter_names,
    lora_configs,
)
from pytest_lora.inspection.peft_state import loading_device, save_adapters
from pytest_lora.inspection.quiet import quiet_libraries
from pytest_lora.inspection.state import Keeper

Base = nn.Module | Callable[[], nn.Module]

_ADAPTER_PARTS = ("lora_", "modules_to_save", "trainable_tokens_")

_ROUNDED = 2**-15
"""Share of a tensor's largest number by which rounding may have moved a base in float32. PEFT's attention adds the
update to the weight in every pass and takes it off again (measured: 22 steps of float32, 2**-18.5, after 200 trained
steps), and parametrizations compute their weight anew. A base that went through bfloat16 or float16 differs by more."""


def reload_facts(model: nn.Module, batch: Any, *, base: Base | None = None) -> ReloadFacts:
    """Save the adapters of a copy, load them on a fresh base, and compare.

    Args:
        model: Anything with PEFT LoRA layers.
        batch: What the model is called with.
        base: The base without adapters, or a function that makes it; by default that under the adapters.

    Raises:
        TypeError: ``model`` carries no LoRA layers, or ``base`` is no base.
        ValueError: ``base`` has to be given or does not suit the model, or the model cannot be copied, run or saved.
        OSError: The adapter cannot be written into a temporary folder.
    """
    _require_base(model, base)
    given = base if isinstance(base, nn.Module) else None
    with Keeper(model, batch), Keeper(given), quiet_libraries():
        adapted = adapted_copy(model)
        trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
        expected, moving = watched_output(adapted, batch)
        if base is None:
            fresh = base_without_adapter(adapted, forget_trained=True)
        else:
            fresh = _given_base(base, packed=was_packed_for_cpu(model))
        try:
            reloaded = _reloaded(adapted, fresh)
        except _LoadingError as error:
            return ReloadFacts(refusal=str(error))
        compared = _compared(adapted, reloaded, trained, moving, base is not None)
        return replace(compared, apart=distance(expected, output_of(reloaded, batch)))


def _require_base(model: nn.Module, base: Base | None) -> None:
    """Raise where what is given as ``base`` does not suit the model."""
    found = adapted_survey(model)
    if base is None:
        for config in lora_configs(found.root).values():
            if field := rewriter(config):
                raise ValueError(
                    f"base must be given: {field} rewrote the weights under the adapter, and loading it starts from "
                    "the original ones"
                )
        return
    if not callable(base):
        raise TypeError(f"base must be a model or a function that makes one, not {type(base).__name__}")
    merged = [name for name, layer in found.lora.items() if layer.merged]
    if merged:
        raise ValueError(
            f"model is merged on {grouped(merged)}, which rounds the weights that base is compared with; "
            "load it anew, or leave base out"
        )


def _given_base(base: Base, packed: bool) -> nn.Module:
    """The base in evaluation mode; ``packed`` where the weights under the adapter were packed for the CPU."""
    if isinstance(base, nn.Module):
        made: Any = base
    else:
        try:
            made = base()
        except Exception as error:  # whatever the user's function raises
            raise ValueError(f"base: the function raises {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"base must be a model or a function that makes one, not {type(made).__name__}")
    if any(isinstance(m, BaseTunerLayer) for m in made.modules()):
        raise ValueError("base must be a model without adapters")
    own = copy_of("base", made) if made is base else made
    if packed:
        pack_for_cpu(own)
    return quiet_eval("base", own)


class _LoadingError(Exception):
    """What was saved cannot be loaded."""


@contextmanager
def _saving() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the adapter cannot be saved into a temporary folder in {tempfile.gettempdir()}: {error}; "
            "let TMPDIR be a folder that can be written and has room for it"
        ) from error


@contextmanager
def _loading() -> Iterator[None]:
    try:
        yield
    # A router of Arrow is saved without the names of its adapters, which PEFT then looks for on None.
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise _LoadingError(f"{type(error).__name__}: {error}") from error


def _reloaded(adapted: nn.Module, fresh: nn.Module) -> nn.Module:
    layer = next(iter(lora_layers(adapted).values()))
    active = list(active_adapters(layer))
    reload = _reloaded_peft if isinstance(adapted, WRAPPERS) else _reloaded_transformers
    with ExitStack() as stack:
        with _saving():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        return quiet_eval("model", reload(adapted, fresh, active, Path(folder)))


def _reloaded_peft(adapted: Any, fresh: nn.Module, active: list[str], folder: Path) -> nn.Module:
    from peft import PeftModel

    if not isinstance(adapted, PeftModel):
        raise ValueError(f"model cannot be saved: PEFT has no save_pretrained for {type(adapted).__name__}")
    with _saving():
        save_adapters(adapted, str(folder))
    homes = {name: folder if name == "default" else folder / name for name in adapted.peft_config}
    (first, home), *others = homes.items()
    device = loading_device(fresh)
    with _loading():
        # AdaLoRA's forward pass raises where none of its adapters is trainable.
        reloaded: Any = type(adapted).from_pretrained(
            fresh, str(home), adapter_name=first, is_trainable=True, torch_device=device
        )
        for name, home in others:
            reloaded.load_adapter(str(home), adapter_name=name, torch_device=device)
        reloaded.base_model.set_adapter(active)
    return as_module(reloaded)


def _reloaded_transformers(adapted: Any, fresh: Any, active: list[str], folder: Path) -> nn.Module:
    if len(active) != 1 or not hasattr(adapted, "save_pretrained") or not hasattr(fresh, "load_adapter"):
        raise ValueError(
            f"model cannot be saved: {type(adapted).__name__} with active adapters {active} has no save_pretrained "
            "that writes one adapter; wrap it with peft.get_peft_model"
        )
    with _saving():
        adapted.save_pretrained(str(folder))
    with _loading():
        fresh.load_adapter(str(folder), adapter_name=active[0])
    return as_module(fresh)


def _compared(
    adapted: nn.Module, reloaded: nn.Module, trained: set[str], moving: frozenset[str], base_given: bool
) -> ReloadFacts:
    left_out = _unsaved_adapters(adapted)
    before = {
        name: tensor
        for name, tensor in adapted.state_dict().items()
        if name not in moving and not left_out.intersection(name.split("."))
    }
    after = reloaded.state_dict()
    lost: list[str] = []
    changed: list[str] = []
    recast: list[str] = []
    foreign: list[str] = []
    rounded: list[str] = []
    for name, tensor in before.items():
        other = after.get(name)
        same = other is not None and other.shape == tensor.shape and identical(other.to(tensor), tensor)
        is_adapter = any(part in name for part in _ADAPTER_PARTS)
        if not (same or is_adapter or name in trained) and other is not None and _is_rounded(tensor, other):
            rounded.append(name)
            continue
        if not same:
            (changed if is_adapter else lost if name in trained else foreign).append(name)
        elif is_adapter and other is not None and other.dtype != tensor.dtype:
            recast.append(name)
    return ReloadFacts(
        lost=tuple(lost),
        changed=tuple(changed),
        foreign=tuple(foreign) if base_given else (),
        merged=tuple(_merged_already(adapted, after, foreign)) if base_given else (),
        rounded=tuple(rounded),
        recast=tuple(recast),
        dtypes=(str(before[recast[0]].dtype), str(after[recast[0]].dtype)) if recast else None,
    )


def _merged_already(adapted: nn.Module, after: dict[str, Tensor], foreign: list[str]) -> Iterator[str]:
    """Weights under an adapter whose difference from those of the other base is what the adapters add there."""
    layers = lora_layers(adapted)
    for name in foreign:
        place, _, leaf = name.rpartition(".base_layer.")
        layer = layers.get(place) if leaf == "weight" else None
        own, other = (getattr(layer, "weight", None), after.get(name))
        if layer is None or own is None or other is None or own.shape != other.shape:
            continue
        if not own.is_floating_point() or not hasattr(layer, "get_delta_weight"):
            continue
        apart = own.float() - other.to(own)
        names = (adapter for adapter in active_adapters(layer) if adapter in layer.scaling)
        added = sum(layer.get_delta_weight(adapter).float() for adapter in names)
        error = min(float((apart - added).norm()), float((apart + added).norm()))
        if error <= MERGED_WITHIN * float(apart.norm()):
            yield name


MERGED_WITHIN = 0.1
"""Share of a difference of bases that may be other than the adapter's update: a merge in bfloat16 rounds each weight by
up to 2^-9 of it, which is some percent of an update of a tenth of the weight."""


def _is_rounded(tensor: Tensor, other: Tensor) -> bool:
    precise = tensor.is_floating_point() and tensor.dtype.itemsize >= 4 and other.shape == tensor.shape
    return precise and distance(other.to(tensor), tensor) <= _ROUNDED * largest(tensor)


def _unsaved_adapters(adapted: nn.Module) -> set[str]:
    """Names of adapters that the model's ``save_pretrained`` does not write: with transformers' own, the inactive."""
    if isinstance(adapted, WRAPPERS):
        return set()
    layers = lora_layers(adapted).values()
    return {name for layer in layers for name in adapter_names(layer) if name not in active_adapters(layer)}
