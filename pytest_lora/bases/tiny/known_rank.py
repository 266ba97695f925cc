"""A task on the built-in base whose best rank is known by construction: a change of the output head of exact rank k."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_lora.bases.tiny.model import load_tiny
from pytest_lora.bases.tiny.text import sample_texts, text_batch

if TYPE_CHECKING:
    from torch import Tensor, nn

TARGET = "lm_head"
TRAIN_TEXTS = 64
HELD_OUT_TEXTS = 32
HELD_OUT_START = 5000
DIRECTIONS = 64
"""Principal directions of the head's inputs that the teacher's change reads; the rest carry next to nothing."""

LEARNING_RATE = 1e-2
"""Where the plan has none."""


class KnownRankTask:
    """A student that distils the logits of a teacher, which is the base plus a change of its head of rank k.

    All k singular values of the change are equal, seen from the head's inputs on text: each direction of rank one holds
    the same share of what there is to learn. So an adapter of rank r < k reaches r / k of it, one of rank k all of it,
    and a larger one nothing more. The hidden states do not depend on the head, so that they are computed once, and a
    trial takes a second.

    The methods are arguments of ``rank_sweep``: ``rank_sweep(task.make_model, task.train, task.evaluate,
    config=task.config, fraction=1.0)``.

    Args:
        rank: The exact rank k of the change, 1 to 64.
        seed: Seed of its random directions; no global random state is used.

    Raises:
        ValueError: ``rank`` is out of its range.
    """

    def __init__(self, rank: int, seed: int = 0) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= DIRECTIONS:
            raise ValueError(f"rank must be an integer from 1 to {DIRECTIONS}, not {rank!r}")
        self.rank, self.seed = rank, seed

    def __getstate__(self) -> dict[str, Any]:
        """Rank and seed: a worker process computes the rest itself."""
        return {"rank": self.rank, "seed": self.seed}

    @property
    def config(self) -> dict[str, Any]:
        """Fields of ``LoraConfig``."""
        return {"target_modules": [TARGET], "task_type": "CAUSAL_LM"}

    @cached_property
    def _base(self) -> nn.Module:
        return load_tiny(quantization=None)

    @cached_property
    def _texts(self) -> dict[str, Tensor]:
        """Inputs of the head, float32 of shape (tokens, 128), for training and held out."""
        return {
            "train": _head_inputs(self._base, TRAIN_TEXTS, 0),
            "held out": _head_inputs(self._base, HELD_OUT_TEXTS, HELD_OUT_START),
        }

    @cached_property
    def _change(self) -> Tensor:
        """What the teacher's head has on top of the base's, float32 of shape (320, 128), of rank k."""
        import torch

        inputs = self._texts["train"].double()
        values, vectors = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
        values, vectors = values.flip(0)[:DIRECTIONS], vectors.flip(1)[:, :DIRECTIONS]
        generator = torch.Generator().manual_seed(self.seed)
        head: Any = self._base.get_submodule(TARGET)
        left = torch.randn(head.out_features, self.rank, generator=generator, dtype=torch.double)
        right = torch.randn(DIRECTIONS, self.rank, generator=generator, dtype=torch.double)
        whitened = torch.linalg.qr(right)[0].T @ torch.diag(values.rsqrt()) @ vectors.T
        change: Tensor = (torch.linalg.qr(left)[0] @ whitened).float()
        return change

    def make_model(self) -> nn.Module:
        """A fresh base."""
        return copy.deepcopy(self._base)

    def train(self, model: nn.Module, plan: Any) -> list[float]:
        """Distil with AdamW for 300 steps an epoch, 256 tokens each; returns the loss of every step."""
        import torch

        head = model.get_submodule(f"base_model.model.{TARGET}")
        inputs = self._texts["train"]
        changes = inputs @ self._change.T
        base_logits = inputs @ self._base.get_submodule(TARGET).get_parameter("weight").T
        steps = max(1, round(300 * plan.epochs * plan.fraction))
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=LEARNING_RATE if plan.learning_rate is None else plan.learning_rate,
            weight_decay=0.0,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(plan.seed))
        losses = []
        for step in range(steps):
            rows = order[torch.arange(step * 256, (step + 1) * 256) % len(inputs)]
            learned = head(inputs[rows]) - base_logits[rows]
            loss = (learned - changes[rows]).square().sum(1).mean() / self.rank
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def evaluate(self, model: nn.Module) -> float:
        """The share of the teacher's change in the logits that the student makes, on held-out text; 1 is all of it."""
        import torch

        inputs = self._texts["held out"]
        head: Any = model.get_submodule(f"base_model.model.{TARGET}")
        with torch.no_grad():
            made = head(inputs) - inputs @ self._base.get_submodule(TARGET).get_parameter("weight").T
            wanted = inputs @ self._change.T
            return 1 - float((made - wanted).square().mean() / wanted.square().mean())


def _head_inputs(base: nn.Module, count: int, start: int) -> Tensor:
    """Final hidden states of the base on texts, padding left out."""
    import torch

    batch = text_batch(sample_texts(count, start=start), batch_size=count)
    body: Any = base.get_submodule("model")
    with torch.no_grad():
        states: Tensor = body(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
    return states[batch["attention_mask"].bool()]
