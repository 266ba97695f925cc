"""The batch law: a text alone gives what it gives in its batch. Asked of the model itself, in evaluation mode."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pytest_lora.facts.batches import AloneFacts
from pytest_lora.inspection.behaviour import TOLERANCES, largest, main_tensor, output_of
from pytest_lora.inspection.behaviour.texts import (
    PACKED,
    Text,
    is_encoder_decoder,
    mask_of,
    pad_token,
    text_config,
    texts_of,
)
from pytest_lora.inspection.placement import device_of, on_device
from pytest_lora.inspection.quiet import quiet_libraries
from pytest_lora.inspection.state.precision import without_tf32


class BatchLaw:
    """Compares a text alone with the same text in its batch, around a training step that runs the batch anyway.

    The step gives one of the results where dropout and the like have no part in it. Else, and where the two are apart,
    the row is run once more in evaluation mode. To be used where a keeper puts back hooks and what a model notes of its
    calls.
    """

    def __init__(self, model: nn.Module, root: nn.Module, batches: Mapping[int, Any]) -> None:
        """Look for a text with company, and note what the model gives for it from now on.

        Args:
            model: What is called.
            root: The base, whose configuration is read.
            batches: Batches for ``model(**batch)`` by their index; of those without padding and packed documents
                nothing is asked.
        """
        self._model, self._root = model, root
        self._text = self._find(batches)
        self._batch: Any = batches[self._text.batch] if self._text else None
        self._result: Tensor | None = None
        self._handle = model.register_forward_hook(self._note) if self._text else None

    @property
    def asks(self) -> bool:
        """Whether there is a text to compare."""
        return self._text is not None

    def _find(self, batches: Mapping[int, Any]) -> Text | None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return None  # the other ranks would have to run along, and their rows may have no padding
        found = next((text for text in texts_of(batches, self._root) if text is not None), None)
        return None if found is None or _is_of_its_length(self._root, found.length) else found

    def _note(self, module: nn.Module, arguments: Any, output: Any) -> None:
        try:
            result = main_tensor(output)
        except (ValueError, TypeError):
            return
        if self._text and result.shape[0] == len(self._batch["input_ids"]):
            self._result = result[self._text.row : self._text.row + 1].detach().clone()

    def compared(self) -> AloneFacts | None:
        """Run the text alone, without gradients, and end to look.

        Returns:
            Both results compared; None where no text has company, or the model cannot be run or compared that way.
        """
        if self._handle is None or self._text is None:
            return None
        self._handle.remove()
        model, found = self._model, self._text
        batch = on_device(_given(self._batch), device_of(model))
        with quiet_libraries(), without_tf32(), _evaluation(model), _uncompiled(), torch.no_grad():
            try:
                return self._compared(batch, found, output_of(model, _alone(batch, found, self._root)))
            except Exception:  # whatever a model raises for what it does not take
                return None

    def _compared(self, batch: dict[str, Any], found: Text, alone: Tensor) -> AloneFacts | None:
        tolerance = _tolerance(self._model, alone)
        if tolerance is None or not alone.isfinite().all():
            return None
        if self._result is not None:
            apart = _apart(self._result, alone, found)
            if apart is not None and apart <= tolerance:
                return self._facts(batch, found, self._result.shape == alone.shape, apart, tolerance)
        together = _in_company(batch, found, self._root)
        cached = found.company == "documents" and _caches(self._root)
        first = output_of(self._model, {**together, "use_cache": True} if cached else together)
        apart = _apart(first, alone, found)
        if apart is None:
            return None
        if cached and apart > tolerance:
            first, with_cache = output_of(self._model, together), apart
            apart = _apart(first, alone, found) or 0.0
            if apart <= tolerance:
                return self._facts(
                    batch, found, first.shape == alone.shape, with_cache, tolerance, cached=True
                )
        if apart > tolerance and _relative(first, output_of(self._model, together)) > tolerance:
            return None  # the model gives something else at every call
        return self._facts(batch, found, first.shape == alone.shape, apart, tolerance)

    def _facts(
        self,
        batch: dict[str, Any],
        found: Text,
        alike: bool,
        apart: float,
        tolerance: float,
        *,
        cached: bool = False,
    ) -> AloneFacts:
        return AloneFacts(
            batch=found.batch,
            row=found.row,
            tokens=found.stop - found.start,
            company=found.company,
            side="both" if found.start and found.stop < found.length else "left" if found.start else "right",
            pooled=alike and not is_encoder_decoder(self._root),
            apart=apart,
            tolerance=tolerance,
            mask=mask_of(batch, found),
            positions="position_ids" in batch,
            filler=found.filler,
            pad=pad_token(self._root),
            cached=cached,
        )


# ---------------------------------------------------------------------------------------- inputs


def _given(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if value is not None}


def _in_company(batch: dict[str, Any], text: Text, root: nn.Module) -> dict[str, Any]:
    """The row of the text; of packed documents, up to the end of this one, as none sees what comes after it."""
    given = {**_without_targets(batch, root), **_without_cache(root)}
    if set(given) & PACKED:
        return given  # these count through the whole batch
    rows = {n: v[text.row : text.row + 1] if isinstance(v, Tensor) else v for n, v in given.items()}
    if text.company == "documents":
        rows = {n: v[..., : text.stop] if isinstance(v, Tensor) else v for n, v in rows.items()}
        if (mask := rows.get("attention_mask")) is not None and mask.ndim == 4:
            rows["attention_mask"] = mask[..., : text.stop, :]
    return rows


def _alone(batch: dict[str, Any], text: Text, root: nn.Module) -> dict[str, Any]:
    """The tokens of the text and no others; the model itself counts their positions."""
    left_out = {"position_ids", *PACKED}
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
    known = "use_cache" in taken or (passed_on and hasattr(text_config(root), "use_cache"))
    return {"use_cache": False} if known else {}


def _caches(root: nn.Module) -> bool:
    """Whether a training step fills that cache, beside which transformers does not look for packed documents."""
    checkpoints = any(vars(module).get("gradient_checkpointing", False) for module in root.modules())
    return bool(_without_cache(root) and getattr(text_config(root), "use_cache", False)) and not checkpoints


def _without_targets(batch: dict[str, Any], root: nn.Module) -> dict[str, Any]:
    """The inputs, and labels that are none of a token.

    Labels of whole rows stay, as some heads ask for them; and those of an encoder-decoder, which makes of them what its
    decoder reads.
    """
    labels = batch.get("labels")
    kept = is_encoder_decoder(root) or (isinstance(labels, Tensor) and labels.ndim == 1)
    targets = {"num_items_in_batch"} if kept else {"num_items_in_batch", "labels"}
    return {name: value for name, value in batch.items() if name not in targets}


# ---------------------------------------------------------------------------------------- results


def _apart(first: Tensor, second: Tensor, text: Text) -> float | None:
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
    config: Any = text_config(root)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = rope if isinstance(rope, Mapping) else {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        fields = "original_max_position_embeddings", "max_position_embeddings"
        known = (rope.get(fields[0]), *(getattr(config, field, None) for field in fields))
        return length > next((n for n in known if isinstance(n, int)), 0)
    return hasattr(config, "expert_capacity") or getattr(config, "attention_type", None) == "block_sparse"
