"""The batch law: a text alone gives what it gives in its batch. Asked of the model itself, in evaluation mode."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pytest_lora.facts.batch_law import AloneFacts, Company
from pytest_lora.facts.labels import IGNORED
from pytest_lora.inspection.behaviour.copies import TOLERANCES, largest, output_of
from pytest_lora.inspection.placement import device_of, on_device
from pytest_lora.inspection.quiet import quiet_libraries
from pytest_lora.inspection.state.precision import without_tf32

_TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "num_items_in_batch"}
_DECODER = {"decoder_input_ids", "decoder_attention_mask"}
_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What batches of text hold, those of encoder-decoders beside it, and packed ones (``DataCollatorWithFlattening``). Of
other inputs nobody knows what belongs to one text."""

_LEAST = 2
"""Tokens of a document below which it is taken for padding: padded positions often are all zero."""

_RUN = 3
"""Length of the longest run of one token that is taken for padding though nothing says that it is."""


class _Text(NamedTuple):
    """A text in a row of a batch: its tokens are those from ``start`` to ``stop``."""

    batch: int
    row: int
    start: int
    stop: int
    length: int
    company: Company
    filler: int | None


def batch_law(model: nn.Module, root: nn.Module, batches: tuple[Any, ...]) -> AloneFacts | None:
    """Run the shortest text of the first batch that has company in its row, with it and without.

    Two rows are run at most, without gradients: no more than a forward pass of a batch of two. To be called where a
    keeper puts back what a model notes of its calls.

    Args:
        model: What is called.
        root: The base, whose configuration is read.
        batches: Batches for ``model(**batch)``; of those without padding and packed documents nothing is asked.

    Returns:
        Both results compared; None where no text has company, or the model cannot be run or compared that way.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return None  # the other ranks would have to run along, and their rows may have no padding
    found = next((text for text in _texts(batches, root) if text is not None), None)
    if found is None or _is_of_its_length(root, found.length):
        return None
    batch = on_device(_given(batches[found.batch]), device_of(model))
    with quiet_libraries(), without_tf32(), _evaluation(model), _uncompiled(), torch.no_grad():
        try:
            together, alone = _in_company(batch, found, root), _alone(batch, found, root)
            first, second = output_of(model, together), output_of(model, alone)
            apart, tolerance = _apart(first, second, found), _tolerance(model, second)
            if apart is None or tolerance is None or not second.isfinite().all():
                return None
            if apart > tolerance and _relative(first, output_of(model, together)) > tolerance:
                return None  # the model gives something else at every call
            cached = apart <= tolerance and found.company == "documents" and _caches(root)
            if cached:
                apart = _apart(output_of(model, {**together, "use_cache": True}), second, found) or 0.0
        except Exception:  # whatever a model raises for what it does not take
            return None
    return AloneFacts(
        batch=found.batch,
        row=found.row,
        tokens=found.stop - found.start,
        company=found.company,
        side="both" if found.start and found.stop < found.length else "left" if found.start else "right",
        pooled=first.shape == second.shape and not _is_encoder_decoder(root),
        apart=apart,
        tolerance=tolerance,
        mask=_mask(batch, found),
        positions="position_ids" in batch,
        filler=found.filler,
        pad=_pad(root),
        cached=cached,
    )


# ---------------------------------------------------------------------------------------- texts


def _texts(batches: tuple[Any, ...], root: nn.Module) -> Iterator[_Text | None]:
    for index, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        known = _TEXT | _PACKED | (_DECODER if _is_encoder_decoder(root) else set())
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_meta and set(batch) <= known:
            yield _packed(index, ids, batch) if _restarts(ids, batch) else _padded(index, ids, batch, root)


def _restarts(ids: Tensor, batch: Mapping[str, Any]) -> bool:
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != ids.shape:
        return False
    return bool(((positions[:, 1:] == 0) & (positions[:, :-1] != 0)).any())


def _packed(index: int, ids: Tensor, batch: Mapping[str, Any]) -> _Text | None:
    """The first document that stands behind another one."""
    length = ids.shape[1]
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [t for t in range(length) if positions[t] == 0]
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            counts = positions[start:stop] == list(range(stop - start))
            text = _Text(index, row, start, stop, length, "documents", None)
            if start and counts and stop - start >= _LEAST and _mask(batch, text, inside=True) != "hides":
                return text
    return None


def _padded(index: int, ids: Tensor, batch: Mapping[str, Any], root: nn.Module) -> _Text | None:
    """The shortest text that has padding beside it."""
    mask = batch.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return None
    real = mask != 0 if mask is not None and not bool(mask.all()) else _unfilled(ids, batch, root)
    spans = []
    for row, marks in enumerate(real.tolist()):
        start, count = (marks.index(True), sum(marks)) if any(marks) else (0, 0)
        if 0 < count < len(marks) and all(marks[start : start + count]):
            spans.append((count, row, start))
    if not spans:
        return None
    count, row, start = min(spans)
    fillers = set(ids[row][~real[row]].tolist())
    filler = fillers.pop() if len(fillers) == 1 else None
    return _Text(index, row, start, start + count, ids.shape[1], "padding", filler)


def _unfilled(ids: Tensor, batch: Mapping[str, Any], root: nn.Module) -> Tensor:
    """Where no padding stands, although no mask says so.

    Padding is the run of ``pad_token_id`` at an end of a row, or else of one token that ends rows in runs of several
    lengths, of which nothing is a target.
    """
    labels, pad = batch.get("labels"), _pad(root)
    aimed = labels != IGNORED if isinstance(labels, Tensor) and labels.shape == ids.shape else ids < 0
    best = torch.ones_like(ids, dtype=torch.bool)
    for token in {pad} if pad is not None else {*ids[:, 0].tolist(), *ids[:, -1].tolist()}:
        filled = (_run(ids, token) | _run(ids.flip(1), token).flip(1)) & ~aimed
        lengths = set(filled.sum(1).tolist())
        sure = pad is not None or (len(lengths) > 1 and max(lengths) >= _RUN)
        if sure and max(lengths) >= _LEAST and int(filled.sum()) > int((~best).sum()):
            best = ~filled
    return best


def _run(ids: Tensor, token: int) -> Tensor:
    """The run of a token that a row begins with."""
    return (ids == token).long().cumprod(1).bool()


def _mask(batch: Mapping[str, Any], text: _Text, *, inside: bool = False) -> Any:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        return "none"
    if mask.ndim != 2:
        return "shows"
    row, own = mask[text.row] == 0, slice(text.start, text.stop)
    if inside:
        return "hides" if bool(row[own].any()) else "shows"
    return "hides" if bool(row.any()) else "shows"


# ---------------------------------------------------------------------------------------- inputs


def _given(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if value is not None}


def _in_company(batch: dict[str, Any], text: _Text, root: nn.Module) -> dict[str, Any]:
    """The row of the text; of packed documents, up to the end of this one, as none sees what comes after it."""
    given = {**_without_targets(batch, root), **_without_cache(root)}
    if set(given) & _PACKED:
        return given  # these count through the whole batch
    rows = {n: v[text.row : text.row + 1] if isinstance(v, Tensor) else v for n, v in given.items()}
    if text.company == "documents":
        rows = {n: v[..., : text.stop] if isinstance(v, Tensor) else v for n, v in rows.items()}
        if (mask := rows.get("attention_mask")) is not None and mask.ndim == 4:
            rows["attention_mask"] = mask[..., : text.stop, :]
    return rows


def _alone(batch: dict[str, Any], text: _Text, root: nn.Module) -> dict[str, Any]:
    """The tokens of the text and no others; the model itself counts their positions."""
    left_out = {"position_ids", *_PACKED}
    given = {name: value for name, value in _without_targets(batch, root).items() if name not in left_out}
    rows = {name: value[text.row : text.row + 1] for name, value in given.items()}
    own = slice(text.start, text.stop)
    for name in {"input_ids", "token_type_ids"} & rows.keys():
        rows[name] = rows[name][:, own]
    if (mask := rows.pop("attention_mask", None)) is not None and mask.ndim == 2:
        rows["attention_mask"] = torch.ones_like(mask[:, own])
    return {**rows, **_without_cache(root)}


def _without_cache(root: nn.Module) -> dict[str, bool]:
    """Trainers turn the cache of keys and values off, and so does gradient checkpointing."""
    taken = signature(root.forward).parameters
    passed_on = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    known = "use_cache" in taken or (passed_on and hasattr(_text_config(root), "use_cache"))
    return {"use_cache": False} if known else {}


def _caches(root: nn.Module) -> bool:
    """Whether a training step fills that cache, beside which transformers does not look for packed documents."""
    checkpoints = any(vars(module).get("gradient_checkpointing", False) for module in root.modules())
    return bool(_without_cache(root) and getattr(_text_config(root), "use_cache", False)) and not checkpoints


def _without_targets(batch: dict[str, Any], root: nn.Module) -> dict[str, Any]:
    """The inputs; of an encoder-decoder the labels stay, from which it makes what its decoder reads."""
    targets = {"num_items_in_batch"} if _is_encoder_decoder(root) else {"num_items_in_batch", "labels"}
    return {name: value for name, value in batch.items() if name not in targets}


# ---------------------------------------------------------------------------------------- results


def _apart(first: Tensor, second: Tensor, text: _Text) -> float | None:
    """How far the results for the text are apart, or None where they cannot be compared."""
    if first.ndim >= 3 and first.shape[1] != second.shape[1]:
        first = (first[text.row : text.row + 1] if first.shape[0] > 1 else first)[:, text.start : text.stop]
    return _relative(first, second) if first.shape == second.shape else None


def _relative(first: Tensor, second: Tensor) -> float:
    apart = (first.double() - second.double()).abs()
    # An expert chosen otherwise by a rounding error makes one token differ; what a text sees makes all of them.
    each = apart.flatten(2).amax(-1) if apart.ndim >= 3 else apart.amax(-1, keepdim=True)
    scale = largest(second)
    return float(each.median()) / scale if scale else 0.0


def _tolerance(model: nn.Module, result: Tensor) -> float | None:
    """What rounding may do: as much as in the coarsest dtype that computes; None for one that is not known."""
    dtypes = {result.dtype, *(p.dtype for p in model.parameters())}
    device = result.device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    if any(not dtype.is_floating_point for dtype in dtypes):  # quantized: what computes may be any of these
        dtypes = {d for d in dtypes if d.is_floating_point} | {torch.bfloat16}
    return max(TOLERANCES[d] for d in dtypes) if dtypes <= TOLERANCES.keys() else None


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled models as they are: compiling them for two more shapes would take longer than all else."""
    compiled = "torch._dynamo" in sys.modules
    stance: Any = torch.compiler.set_stance
    return stance("force_eager") if compiled else nullcontext()


def _is_of_its_length(root: nn.Module, length: int) -> bool:
    """Whether a model is made to read a text otherwise in a longer row, or beside others.

    Rotary positions that are rescaled beyond a length ("dynamic", "longrope"), experts that take so many tokens and
    no more (Switch Transformers), attention to blocks that are drawn at random (BigBird).
    """
    config: Any = _text_config(root)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = rope if isinstance(rope, Mapping) else {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        fields = "original_max_position_embeddings", "max_position_embeddings"
        known = (rope.get(fields[0]), *(getattr(config, field, None) for field in fields))
        return length > next((n for n in known if isinstance(n, int)), 0)
    return hasattr(config, "expert_capacity") or getattr(config, "attention_type", None) == "block_sparse"


def _is_encoder_decoder(root: nn.Module) -> bool:
    return bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))


def _pad(root: nn.Module) -> int | None:
    pad = getattr(_text_config(root), "pad_token_id", None)
    return pad if isinstance(pad, int) else None


def _text_config(root: nn.Module) -> Any:
    config: Any = getattr(root, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if get else config
