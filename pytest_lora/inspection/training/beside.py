"""What is looked at beside the steps of a training: the shift of the loss, a text alone, padding in a loss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from pytest_lora.facts.batches import AloneFacts, LabelFacts
from pytest_lora.facts.steps import PaddingFacts, ShiftFacts, SpreadFacts
from pytest_lora.inspection.behaviour.batch_law import BatchLaw
from pytest_lora.inspection.training.graph import Passed, Ran
from pytest_lora.inspection.training.padding import Padding
from pytest_lora.inspection.training.plan import Plan
from pytest_lora.inspection.training.shift import Shift
from pytest_lora.inspection.training.special_tokens import Vocabulary
from pytest_lora.inspection.training.spread import listening


class Beside:
    """Looks at the first and the last of some steps, each of which it is told of before, between and after its passes.

    Attributes:
        shift: The first loss beside what the logits give, where that can be asked.
        padding: How much of a loss of the user's own is made of padding, where that can be asked.
        spread: What the first loss compares each with each.
    """

    def __init__(self, model: nn.Module, root: nn.Module, plan: Plan, passed: Passed) -> None:
        self.shift: ShiftFacts | None = None
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

    def followed_back(self, index: int) -> None:
        """The backward pass of the step is done, or there is none."""
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
