"""Weights and buffers of the base that changed, as facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pytest_lora.facts.steps import BaseChange
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.survey import Survey


class _Held(NamedTuple):
    name: str
    module: str
    kind: Literal["weight", "buffer"]
    tensor: Tensor
    batch_norm: bool


def _base_tensors(found: Survey) -> Iterator[_Held]:
    """Parameters and saved buffers of the base; tied ones once."""
    seen: set[int] = set()
    for module_name, module in found.modules.items():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        unsaved = module._non_persistent_buffers_set
        own: list[tuple[str, Tensor | None, Literal["weight", "buffer"]]] = [
            *((n, p, "weight") for n, p in module._parameters.items()),
            *((n, b, "buffer") for n, b in module._buffers.items() if n not in unsaved),
        ]
        for name, tensor, kind in own:
            if tensor is not None and id(tensor) not in seen and tensor.device.type != "meta":
                seen.add(id(tensor))
                full = f"{module_name}.{name}" if module_name else name
                yield _Held(full, module_name, kind, tensor, norm)


def since_probe(found: Survey, keeper: Keeper) -> Iterator[BaseChange]:
    """What differs from the copies that were made before the steps."""
    for held in _base_tensors(found):
        before = keeper.before(held.tensor)
        if before is not None:
            yield from _changed(held, before, "probe", found)


def since_snapshot(model: nn.Module, found: Survey, snapshot: Mapping[str, Tensor]) -> Iterator[BaseChange]:
    """What differs from tensors that the user kept, by their name in the base or in the whole model.

    Raises:
        ValueError: No name of the snapshot is in the base.
    """
    outer: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        outer.setdefault(id(tensor), []).append(name)
    known = False
    for held in _base_tensors(found):
        names = (held.name, *outer.get(id(held.tensor), ()))
        before = next((snapshot[n] for n in names if n in snapshot), None)
        if before is not None:
            known = True
            yield from _changed(held, before, "snapshot", found)
    if snapshot and not known:
        raise ValueError(f"base_snapshot: no name in it is in the model, such as {next(iter(snapshot))!r}")


def _changed(
    held: _Held, before: Tensor, since: Literal["snapshot", "probe"], found: Survey
) -> Iterator[BaseChange]:
    now = held.tensor.detach()
    relative = _distance(now, before.detach())
    if relative:
        yield BaseChange(
            name=held.name,
            module=held.module,
            kind=held.kind,
            since=since,
            relative=relative,
            precision=torch.finfo(now.dtype).eps if now.is_floating_point() else 0.0,
            trainable=held.tensor.requires_grad,
            adapted=held.module in found.lora,
            batch_norm=held.batch_norm,
        )


def _distance(now: Tensor, before: Tensor) -> float:
    """Norm of the difference over the norm before; share of other values where they are no floats."""
    if now.shape != before.shape or now.dtype != before.dtype:
        return 1.0
    before = before.to(now.device)
    if torch.equal(now, before):
        return 0.0
    if not now.is_floating_point():
        return float((now != before).float().mean())
    a, b = now.float(), before.float()
    if bool(((a == b) | (a.isnan() & b.isnan())).all()):
        return 0.0
    size = float(torch.linalg.vector_norm(b))
    distance = float(torch.linalg.vector_norm(a - b))
    return distance / size if size else 1.0
