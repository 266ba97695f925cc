"""What is looked at beside the steps of a training: the shift of the loss, a text alone, padding in a loss, and losses
of two tensors that torch spreads over each other.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.batches import COPIED, IGNORED, AloneFacts, LabelFacts
from pytest_lora.facts.steps import PaddingFacts, ShiftFacts, SpreadFacts, TaughtFacts
from pytest_lora.inspection.base import embeddings_of
from pytest_lora.inspection.behaviour.batch_law import BatchLaw
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.circumstances import Passed, Ran
from pytest_lora.inspection.training.labels import taught_facts
from pytest_lora.inspection.training.special_tokens import Vocabulary

_SAYS = "Using a target size"
_SIZES = re.compile(
    r"target size \(torch\.Size\(\[([\d, ]*)\]\)\) that is different to the input size "
    r"\(torch\.Size\(\[([\d, ]*)\]\)\)"
)


class Shift:
    """Sees the logits that a model gives while one loss is made, and compares them with that loss and its gradient."""

    def __init__(self, root: nn.Module) -> None:
        """Begin to look; the hook goes where the keeper puts back all hooks."""
        self._calls = 0
        self._logits: Tensor | None = None
        self._aims: Tensor | None = None
        self._read: Any = None
        self._handle = root.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, arguments: Any, named: Mapping[str, Any], output: Any) -> None:
        self._calls += 1
        self._read = named.get("input_ids", arguments[0] if arguments else None)
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        self._logits = None
        if isinstance(logits, Tensor) and logits.ndim == 3:
            self._logits = logits.detach()
            inner: Any = logits
            if inner.requires_grad:
                inner.register_hook(self._ask)

    def _ask(self, gradient: Tensor) -> None:
        """Note where the gradient is lowest, which is at the target of a cross-entropy, smoothed or not."""
        lowest, aims = gradient.min(-1)
        self._aims = aims.masked_fill(~(lowest < 0), IGNORED)

    def taught(self, batch: Any, labelled: tuple[LabelFacts, ...], index: int) -> TaughtFacts | None:
        """Which token the loss asked for, once it was followed back; None where that is no question of positions."""
        known = next((k for k in labelled if k.batch == index), None)
        (aims, read), self._aims, self._read = (self._aims, self._read), None, None
        if aims is None or known is None or self._calls != 1:
            return None
        hidden = known.kind == "causal" and not _begins(batch.get("input_ids"), read)
        return None if hidden else taught_facts(aims, batch, known)

    def compared(
        self, loss: Tensor, batch: Any, labelled: tuple[LabelFacts, ...], index: int
    ) -> ShiftFacts | None:
        """End to look; None where the model was called more than once, or its labels are no copy of its input."""
        self._handle.remove()
        known = next((k for k in labelled if k.batch == index), None)
        logits, self._logits = self._logits, None
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if (
            known is None
            or known.kind != "causal"
            or max(known.same, known.ahead) < COPIED
            or self._calls != 1
        ):
            return None
        if logits is None or labels is None or logits.shape[:2] != labels.shape or logits.shape[1] < 2:
            return None
        labels = labels.to(logits.device)
        in_place, ahead = _mean(logits, labels), _mean(logits[:, :-1], labels[:, 1:])
        if in_place is None or ahead is None:
            return None
        return ShiftFacts(loss=float(loss.detach()), in_place=in_place, ahead=ahead)


def _begins(tokens: Any, read: Any) -> bool:
    """Whether a model has read these tokens, but for some at the end; a loss may hide tokens of its batch."""
    if not (isinstance(tokens, Tensor) and isinstance(read, Tensor) and tokens.ndim == read.ndim == 2):
        return False
    return torch.equal(tokens[:, : read.shape[1]].to(read.device), read)


def _mean(logits: Tensor, labels: Tensor) -> float | None:
    """The mean cross-entropy, row by row, as all logits in float32 may not fit beside the model."""
    total, number = 0.0, 0
    with torch.no_grad():
        for row, aims in zip(logits, labels, strict=True):
            counted = aims != IGNORED
            if counted.any():
                total += float(
                    nn.functional.cross_entropy(row[counted].float(), aims[counted], reduction="sum")
                )
                number += int(counted.sum())
    return total / number if number else None


@contextmanager
def listening(heard: list[SpreadFacts]) -> Iterator[None]:
    """Note what torch says inside of sizes that differ; all warnings are shown afterwards as they would have been.

    Torch warns once a place, so that a run before may have used its warning up: here it speaks always.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", message=_SAYS, category=UserWarning)
        try:
            yield
        finally:
            seen = list(said)
    for one in seen:
        heard.extend(_spread(str(one.message)))
        warnings.showwarning(one.message, one.category, one.filename, one.lineno)


def _spread(message: str) -> Iterator[SpreadFacts]:
    found = _SIZES.search(message)
    if found:
        target, given = (tuple(int(n) for n in sizes.split(",") if n.strip()) for sizes in found.groups())
        whole = math.prod(_together(target, given))
        if whole > max(math.prod(target), math.prod(given)):
            yield SpreadFacts(target=target, given=given)


def _together(left: tuple[int, ...], right: tuple[int, ...]) -> Iterator[int]:
    """The shape that two are spread to."""
    length = max(len(left), len(right))
    for one, other in zip(*((1,) * (length - len(s)) + s for s in (left, right)), strict=True):
        yield max(one, other)


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
        embeddings = embeddings_of(root, "input")
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


class Beside:
    """Looks at the first and the last of some steps, each of which it is told of before, between and after its passes.

    Attributes:
        shift: The first loss beside what the logits give, where that can be asked.
        taught: Which token the first loss asks for, where its gradient tells.
        padding: How much of a loss of the user's own is made of padding, where that can be asked.
        spread: What the first loss compares each with each.
    """

    def __init__(self, model: nn.Module, root: nn.Module, plan: Plan, passed: Passed) -> None:
        self.shift: ShiftFacts | None = None
        self.taught: TaughtFacts | None = None
        self.padding: PaddingFacts | None = None
        self.spread: list[SpreadFacts] = []
        self._model, self._root, self._plan, self._passed = model, root, plan, passed
        self._shift: Shift | None = None
        self._padding: Padding | None = None
        self._law: BatchLaw | None = None
        self._alone: AloneFacts | None = None

    def begin(self, number: int, index: int, batch: Any, words: Vocabulary, *, graphs: bool) -> None:
        """A step is about to be taken.

        Args:
            number: Its number, from 1 on.
            index: Index of its batch.
            batch: The batch.
            words: Special tokens of the base.
            graphs: Whether every loss before had a graph.
        """
        self._shift = Shift(self._root) if number == 1 else None
        self._law = self._law_of(number, {index: batch})
        self._padding = Padding(self._root, words) if graphs and self._asks_for_padding(number) else None

    def hearing(self, number: int) -> AbstractContextManager[None]:
        """To be entered while the loss of a step is made."""
        return listening(self.spread) if number == 1 else nullcontext()

    def loss_made(self, loss: Tensor, index: int, batch: Any, labels: tuple[LabelFacts, ...]) -> None:
        """The forward pass of the step is done."""
        if self._shift:
            self.shift = self._shift.compared(loss, batch, labels, index)

    def followed_back(self, index: int, batch: Any, labels: tuple[LabelFacts, ...]) -> None:
        """The backward pass of the step is done, or there is none."""
        if self._shift:
            self.taught = self._shift.taught(batch, labels, index)
        if self._padding:
            self.padding = self._padding.seen(index)
        if self._law:
            with self._passed.looking_away():
                self._alone = self._law.compared()

    def batch_law(self, used: Mapping[int, Any]) -> AloneFacts | None:
        """A text alone against the same text in its batch, where the model itself makes the loss.

        Args:
            used: The batches of all steps, by their index.
        """
        if self._plan.loss_fn is not None:
            return None
        return self._alone if self._law is not None else BatchLaw(self._model, self._root, used).compared()

    def _law_of(self, number: int, batch: Mapping[int, Any]) -> BatchLaw | None:
        """The law, asked of the last forward pass: the model may keep something of a text alone (positions, caches)."""
        if number != self._plan.steps or self._plan.loss_fn is not None:
            return None
        law = BatchLaw(self._model, self._root, batch)
        return law if law.asks else None

    def _asks_for_padding(self, number: int) -> bool:
        """At the last step of a loss of the user's own, unless the graph hangs on what embeddings require."""
        last = 1 < number == self._plan.steps and self._plan.loss_fn is not None
        checkpoints = last and any(vars(m).get("gradient_checkpointing", False) for m in self._root.modules())
        return last and not checkpoints and not self._passed.at_most(Ran.CUT)
