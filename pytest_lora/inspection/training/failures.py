"""What a step raised, where its words tell what is wrong with the set-up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.steps import Failure, FailureKind, Phase
from pytest_lora.inspection.training.batches import NoHeadError
from pytest_lora.inspection.training.media import grids_disagree

_RAISED_BY_TORCH = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)

_WORDS: dict[str, FailureKind] = {
    r"features.* tokens? do not match|placeholder|pixel_values|(image|video|audio) tokens": "placeholders",
    r"token_type_ids`? (is|are) (required|missing)": "token types",
    r"target dtype|[Tt]arget size|dtype Long|dtype Float but|be cast to|probabilities": "label dtype",
    r"'indices'": "ids are not whole",
    r"input batch_size": "label shape",
    r"padding token": "no padding token",
    r"dtype|scalar type": "weight dtypes",
    r"index out of range|out of bounds|device-side": "index",
    r"same device|on device": "devices",
    r"[Ii]nference tensor": "inference tensors",
    r"unexpected keyword": "unknown input",
    r"second time": "graph used twice",
    r"inplace|in-place": "changed in place",
}
"""Words of torch and transformers, and what they say; the first that fit count."""


_ARGUMENT = re.compile(r"(?:unexpected keyword|multiple values for (?:keyword )?)\s*argument '(\w+)'")


class StepError(Exception):
    """A step raised, for a reason that is known."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failure_of(
    error: Exception, phase: Phase, model: nn.Module, batch: Any, *, step: int, index: int
) -> Failure | None:
    """What an error says of the set-up; ``None`` for one whose words are not known, as for memory that ran out.

    Args:
        error: What was raised.
        phase: Where.
        model: The model without what wraps it.
        batch: What the step was taken on.
        step: Number of the step, from 1 on.
        index: Index of the batch.
    """
    if not isinstance(error, _RAISED_BY_TORCH) or isinstance(error, torch.OutOfMemoryError):
        return None
    message = str(error).strip()
    length, positions, odd = _length(batch), _positions(model), tuple(_odd(batch))
    kind: FailureKind | None
    if phase == "forward pass" and length and positions and length > positions:
        kind = "text too long"
    elif phase == "forward pass" and odd:
        kind = "inputs of other lengths"
    elif phase == "forward pass" and grids_disagree(batch, model):
        kind = "placeholders"
    elif phase == "forward pass" and _is_handed_on(message, batch):
        kind = "input of the wrapper"
    elif phase == "optimizer step" and "size" in message:
        kind = "state of another shape"
    elif isinstance(error, NoHeadError):
        kind = "no head"
    else:
        kind = next((kind for words, kind in _WORDS.items() if re.search(words, message)), None)
    if kind is None:
        return None
    if kind == "no head":
        says = "it gives no loss for these labels"
        return Failure(step, index, phase, kind, type(model).__name__, says, length, positions)
    lines = message.splitlines() or [""]
    # torch prints a whole module before what it says.
    line = next((line.strip(" )") for line in lines if _ARGUMENT.search(line)), lines[0])
    return Failure(step, index, phase, kind, type(error).__name__, line[:300], length, positions, odd)


def _is_handed_on(message: str, batch: Any) -> bool:
    """Whether an argument is refused that is not in the batch."""
    found = _ARGUMENT.search(message)
    return found is not None and isinstance(batch, Mapping) and found[1] not in batch


_A_TOKEN_EACH = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Inputs that have a value for each token of ``input_ids``, where they have two dimensions."""


def _odd(batch: Any) -> Iterator[str]:
    """Inputs of another length than ``input_ids``. A mask may be longer, by the keys of a cache."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or "past_key_values" in batch:
        return
    for name in _A_TOKEN_EACH:
        value = batch.get(name)
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] != ids.shape[1]:
            yield f"{name} of shape {list(value.shape)} beside input_ids of {list(ids.shape)}"


def _length(batch: Any) -> int | None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.shape[-1] if isinstance(ids, Tensor) and ids.ndim == 2 else None


def _positions(model: nn.Module) -> int | None:
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None
