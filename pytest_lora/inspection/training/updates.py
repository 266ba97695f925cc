"""What some steps did: size and rank of the update of each adapted weight, and what of the base changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pytest_lora.facts.steps import BaseChange, UpdateFacts
from pytest_lora.inspection.peft_internals import (
    LoraLayer,
    active_adapters,
    adapted_weight,
    adapter_names,
    delta_weight,
    dense_weight,
    factors,
    fused_parameter,
    groups_of,
)
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.survey import Survey

WHOLE = 512
"""Matrices whose shorter side is longer than this are judged by a sketch instead of all their singular values."""

SPARE = 8
"""Columns of a sketch above the rank that is allowed: so far beyond it the rank that was found is told apart."""

NOISE = 8.0
"""Singular values below this many times what rounding alone makes are taken for zero."""


class _Kept(NamedTuple):
    module: str
    adapter: str
    layer: LoraLayer
    a: Tensor
    b: Tensor
    weight: Tensor | None
    version: int


class Updates:
    """The factors of each active adapter as they were, to compare with later.

    Only factors are copied, not their products, so that a large model needs no second set of its weights.

    Args:
        found: The model.
        keeper: The copies of base weights that were made before the steps.
    """

    def __init__(self, found: Survey, keeper: Keeper) -> None:
        self._found = found
        self._keeper = keeper
        self._kept = tuple(self._keep())

    def _keep(self) -> Iterator[_Kept]:
        for module, layer in self._found.lora.items():
            for adapter in adapter_names(layer):
                if adapter in active_adapters(layer):
                    pair = factors(layer, adapter)
                    weight = adapted_weight(layer)
                    yield _Kept(
                        module,
                        adapter,
                        layer,
                        pair.a.detach().clone(),
                        pair.b.detach().clone(),
                        weight,
                        0 if weight is None else weight._version,
                    )

    def facts(self, *, ranks: bool) -> tuple[UpdateFacts, ...]:
        """What the steps did; with ``ranks`` also the numerical rank of each update."""
        device = self._kept[0].a.device.type if self._kept else "cpu"
        with torch.no_grad(), torch.autocast(device if device != "meta" else "cpu", enabled=False):
            return tuple(self._facts(kept, ranks) for kept in self._kept)

    def _facts(self, kept: _Kept, ranks: bool) -> UpdateFacts:
        rank = int(kept.layer.r[kept.adapter])
        # B A - 0 has r rows to be made of; B A - B' A' = [B B'] [A; -A'] has 2 r.
        from_zero = not (bool(kept.a.any()) and bool(kept.b.any())) if kept.a.device.type != "meta" else True
        moved, change = self._base_change(kept)
        known = _Update(rank, from_zero, moved)
        if kept.a.device.type == "meta":
            return known.unknown(kept, "its tensors are on the meta device")
        dtype = torch.float64 if ranks and kept.a.device.type != "mps" else torch.float32
        pair = factors(kept.layer, kept.adapter)
        now, reason = _delta(kept, pair.a.detach(), pair.b.detach(), dtype)
        before, _ = _delta(kept, kept.a, kept.b, dtype)
        if now is None or before is None:
            return known.unknown(kept, reason)
        update = now.to(dtype) - before.to(dtype)
        if change is not None and change.ndim > update.ndim:
            change = change.flatten(1)
        if change is not None and change.shape == update.shape:
            update = update + change.to(update.device, dtype)
        if not bool(update.isfinite().all()):
            return known.unknown(kept, "it is not finite")
        largest = max(now.abs().max().item(), before.abs().max().item()) if now.numel() else 0.0
        # One matrix an expert, or one of all: a kernel belongs to the inputs.
        by_expert = fused_parameter(kept.layer) is not None and update.ndim == 3
        matrices = update if by_expert else update.flatten(1)[None]
        weight = dense_weight(kept.layer)
        size = float(torch.linalg.vector_norm(weight.float())) if weight is not None else 0.0
        return UpdateFacts(
            module=kept.module,
            adapter=kept.adapter,
            rank=_rank(matrices, known.allowed, now.dtype, largest) if ranks else None,
            allowed=known.allowed,
            from_zero=from_zero,
            norm=float(torch.linalg.vector_norm(update)),
            relative=float(torch.linalg.vector_norm(update)) / size if size else None,
            base_moved=moved,
            unknown="",
        )

    def _base_change(self, kept: _Kept) -> tuple[bool, Tensor | None]:
        """Whether the weight underneath moved, and by what, where it is stored as numbers."""
        if kept.weight is None or kept.weight.device.type == "meta":
            return False, None
        before = self._keeper.before(kept.weight)
        now = kept.weight.detach()
        if before is None:
            return kept.weight._version != kept.version, None
        if now.shape != before.shape or now.dtype != before.dtype:
            return True, None
        if torch.equal(now, before.to(now.device)):
            return False, None
        return True, (now.float() - before.to(now.device).float()) if now.is_floating_point() else None


class _Update(NamedTuple):
    rank: int
    from_zero: bool
    moved: bool

    @property
    def allowed(self) -> int:
        return self.rank if self.from_zero else 2 * self.rank

    def unknown(self, kept: _Kept, reason: str) -> UpdateFacts:
        return UpdateFacts(
            kept.module,
            kept.adapter,
            None,
            self.allowed,
            self.from_zero,
            math.nan,
            None,
            self.moved,
            reason,
        )


def _delta(kept: _Kept, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, str]:
    """What an adapter adds to its weight with these factors: PEFT's own answer, else the product of matrices."""
    with _set(kept, a.to(dtype), b.to(dtype)):
        try:
            return delta_weight(kept.layer, kept.adapter), ""
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"get_delta_weight raises {type(error).__name__}"
    left, right = b.to(dtype).flatten(1), a.to(dtype).flatten(1)
    groups = groups_of(kept.layer)
    if left.shape[1] * groups != right.shape[0] or left.shape[0] % groups:
        return None, f"{reason}, and the factors are no two matrices of one product"
    product = left.reshape(groups, -1, left.shape[1]) @ right.reshape(groups, -1, right.shape[1])
    return product.flatten(0, 1) * kept.layer.scaling[kept.adapter], ""


@contextmanager
def _set(kept: _Kept, a: Tensor, b: Tensor) -> Iterator[None]:
    """The factors of a layer hold other numbers inside."""
    pair = factors(kept.layer, kept.adapter)
    own = pair.a.data, pair.b.data
    pair.a.data, pair.b.data = a, b
    try:
        yield
    finally:
        pair.a.data, pair.b.data = own


def _rank(matrices: Tensor, allowed: int, stored: torch.dtype, largest: float) -> int:
    """Numerical rank, of several matrices the largest; no more than ``allowed + SPARE`` where it is sketched.

    Rounding to ``stored`` leaves every number off by up to half an eps of it; a matrix of such noise has a spectral
    norm of about its size times (sqrt(rows) + sqrt(columns)) (Vershynin, arXiv:1011.3027, theorem 5.31), and sums of
    r products add up to sqrt(r) of it. A sketch, the matrix times a narrow random one, keeps the rank up to its width
    with probability 1 (Halko, Martinsson and Tropp, arXiv:0909.4061).
    """
    rows, columns = matrices.shape[-2:]
    if min(rows, columns) == 0:
        return 0
    tolerance = NOISE * math.sqrt(allowed) * torch.finfo(stored).eps * largest
    tolerance *= math.sqrt(rows) + math.sqrt(columns)
    if min(rows, columns) > WHOLE:
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(columns, allowed + SPARE, generator=generator, dtype=torch.float64)
        matrices = matrices @ (sketch / math.sqrt(columns)).to(matrices.device, matrices.dtype)
    values = torch.linalg.svdvals(matrices)
    return int((values > tolerance).sum(dim=-1).max())


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
