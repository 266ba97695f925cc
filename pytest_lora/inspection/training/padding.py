"""Whether a loss of the user's own is made of padding, by its gradients at the embedded tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.steps import PaddingFacts
from pytest_lora.inspection.training.special_tokens import Vocabulary


class Padding:
    """Sees, while one loss is made and followed back, where its gradient arrives at the tokens of a padded batch.

    Nothing is run beside the step: the embedded tokens are made to require gradients. So it is not to be used where
    reentrant checkpointing asks whether they do.
    """

    def __init__(self, root: nn.Module, words: Vocabulary) -> None:
        """Begin to look; the hooks go where the keeper puts back all hooks.

        Args:
            root: The base that reads ``input_ids`` and ``attention_mask``.
            words: Its special tokens.
        """
        self._words = words
        self._ids: Tensor | None = None
        self._padded: Tensor | None = None
        self._rows = 0
        self._sums = [0.0, 0.0]
        get = getattr(root, "get_input_embeddings", None)
        try:
            embeddings = get() if get else None
        except (NotImplementedError, AttributeError):
            embeddings = None
        self._handles: list[Any] = []
        if isinstance(embeddings, nn.Module):
            self._handles = [
                root.register_forward_pre_hook(self._called, with_kwargs=True),
                embeddings.register_forward_hook(self._embedded),
            ]

    def _called(self, module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        given = dict(zip(("input_ids", "attention_mask"), arguments, strict=False)) | named
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        self._ids = self._padded = None
        if not (isinstance(ids, Tensor) and isinstance(mask, Tensor) and torch.is_grad_enabled()):
            return
        if ids.shape == mask.shape and self._is_plain(ids[mask == 0]):
            self._ids, self._padded = ids, mask == 0

    def _is_plain(self, fillers: Tensor) -> bool:
        """Whether what the mask hides is padding: tokens may be hidden and read all the same (ColBERT's queries)."""
        tokens = set(fillers.tolist())
        pads = {self._words.pad, *self._words.stops} - {None}
        return len(tokens) == 1 and (self._words.pad is None or tokens <= pads)

    def _embedded(self, module: nn.Module, arguments: Any, output: Any) -> Tensor | None:
        ids, padded = self._ids, self._padded
        read = arguments[0] if arguments else None
        if ids is None or padded is None or not isinstance(read, Tensor) or not isinstance(output, Tensor):
            return None
        if read.shape != ids.shape or output.ndim != 3 or not torch.equal(read, ids):
            return None
        leaf = not output.requires_grad
        if leaf:
            output.requires_grad_()
        self._rows += int(padded.any(1).sum())
        follow: Any = output.register_hook
        follow(partial(self._arrived, padded.to(output.device)))
        return output.clone() if leaf else None  # a model may add to what it embedded in place

    def _arrived(self, padded: Tensor, gradient: Tensor) -> None:
        squares = gradient.detach().float().pow(2).sum(-1)
        for place, part in enumerate((squares[padded], squares)):
            self._sums[place] += float(part.sum())

    def seen(self, batch: int) -> PaddingFacts | None:
        """End to look; None where no padded tokens were embedded, or no gradient arrived."""
        for handle in self._handles:
            handle.remove()
        of_padding, of_all = self._sums
        if not self._rows or not of_all > 0:
            return None
        return PaddingFacts(batch=batch, rows=self._rows, share=float((of_padding / of_all) ** 0.5))
