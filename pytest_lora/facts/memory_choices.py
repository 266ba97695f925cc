"""Choices about a step that decide its memory: its kernels, whose loss it is, and an evaluation beside it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from pytest_lora.values import require_one_of, require_whole

CATEGORIES = (
    "parameter shards",
    "base weights",
    "quantized base weights",
    "quantization statistics",
    "embeddings and head",
    "adapters",
    "gradients",
    "buckets",
    "optimizer",
    "gathered parameters",
    "reduce buffers",
    "activations",
    "logits and loss",
    "dequantization buffers",
    "workspace",
)
"""What memory is held for, in the order in which it is shown."""

Attention = Literal["math", "flash", "efficient", "cudnn"]
ATTENTION_KERNELS: tuple[Attention, ...] = get_args(Attention)
"""Kernels of scaled dot product attention, in the order of ``torch.nn.attention.SDPBackend``."""

Loss = Literal["full", "chunked", "liger", "cut"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
Kernels = Literal["liger", "axolotl"]
KERNELS: tuple[Kernels, ...] = get_args(Kernels)

LIGER_LAYERS = ("rms_norm", "swiglu")
"""Layers of Liger that are counted where a trainer takes them, as ``liger_kernel_config`` calls them."""

SMOOTHING = "label_smoothing_factor"
"""The argument of the Trainer that decides its loss."""


class TrainerFields(tuple[tuple[str, Hashable], ...]):
    """Fields of a trainer's arguments by name, where no arguments were made; the others are its defaults."""

    __slots__ = ()


Kept = Literal["loss", "logits", "predictions"]
EVALUATION_KEEPS: tuple[Kept, ...] = get_args(Kept)
_MOST = {"batch_size": 2**28, "seq_len": 2**24, "batches": 2**28}
"""As of a training step."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation between the steps, as the Trainer runs it: without gradients, in batches of their own.

    Attributes:
        batch_size: Sequences (or pairs) in a batch: ``per_device_eval_batch_size``.
        seq_len: Tokens in each; None for those of the training.
        keeps: What stays on the GPU of each batch: ``"loss"`` alone, as without ``compute_metrics`` or with
            ``prediction_loss_only=True``; ``"logits"``, as with ``compute_metrics``; ``"predictions"``, where
            ``preprocess_logits_for_metrics`` makes one whole number a token of them.
        batches: How many batches stay before they go to the host: ``eval_accumulation_steps``, or without that all of
            the evaluation. None where that is not known, which makes the figures "at least" with logits.

    Raises:
        TypeError, ValueError: A value has the wrong type, or is out of its range; the message names it.
    """

    batch_size: int
    seq_len: int | None = None
    keeps: Kept = "loss"
    batches: int | None = None

    def __post_init__(self) -> None:
        sizes = {"batch_size": self.batch_size, "seq_len": self.seq_len, "batches": self.batches}
        for name, value in sizes.items():
            if value is not None or name == "batch_size":
                require_whole(name, value, least=1, most=_MOST[name])
        require_one_of("keeps", self.keeps, EVALUATION_KEEPS)

    def in_words(self, *, with_tokens: bool = True) -> str:
        """``"an evaluation by 8 x 512 tokens, which keeps the loss"``."""
        length = f" x {self.seq_len} tokens" if self.seq_len and with_tokens else ""
        return f"an evaluation by {self.batch_size}{length}, which keeps the {self.keeps}"


class TimelinePoint(NamedTuple):
    """A stretch of the step: its phase, the repeated layer it ran in (None outside), its peak in bytes."""

    phase: str
    layer: int | None
    peak: int


def peak_rows(evaluation: int, training: int, either: int) -> tuple[tuple[str, int], ...]:
    """The rows of both peaks, the larger below."""
    if not evaluation:
        return (("peak allocated", either),)
    (smaller, less), (larger, most) = sorted(
        [("training", training), ("evaluation", evaluation)], key=lambda part: part[1]
    )
    return ((f"peak of the {smaller}", less), (f"peak allocated, of the {larger}", most))
