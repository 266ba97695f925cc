"""Choices about a step that decide its memory: kernels, whose loss it is, an evaluation beside it, how several GPUs
share it, and what else could be chosen where it does not fit."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

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

HALF_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
"""Dtypes of 16 bits by what ``TrainingArguments`` and accelerate call them."""

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


Offload = Literal["cpu", "optimizer"]

OFFLOADED: tuple[Offload, ...] = get_args(Offload)

STRATEGIES = ("ddp", "fsdp1", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "tp", "device_map")
"""Ways to share a step among GPUs."""

FSDP = ("fsdp1", "fsdp2", "hsdp")
"""Those of torch's fully sharded data parallelism."""

WHOLE = ("ddp", "zero1", "zero2")
"""Those that leave every weight of the base on every GPU."""

SHARDED = (*FSDP, "zero3", "tp", "device_map")
"""Those that divide the weights of the base too."""

OFFLOAD_ENDING = "_offload"
"""What ends the name of a recipe's strategy that leaves weights in the host's memory."""


def divides_weights(strategy: str | None) -> bool:
    """Whether this strategy of a recipe divides the weights of the base among the cards."""
    return str(strategy).removesuffix(OFFLOAD_ENDING) in SHARDED


MACHINE = 8
"""GPUs among which ``hsdp`` divides where nothing else is said: those of one machine."""


MEASURED_ON = {"ddp": 2, "fsdp1": 2, "fsdp2": 2, "zero3": 8}
"""GPUs of the largest measured step that predictions were compared with, by strategy: published ones
(``benchmarks/multi_gpu.py``); of FSDP2 two ranks on a CPU (``tests/memory/test_parallel.py``)."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """How several GPUs share a step.

    Attributes:
        gpus: How many.
        strategy: One of ``STRATEGIES``.
        offload: What lies in the host's memory: ``"cpu"`` parameters, gradients and optimizer, ``"optimizer"`` the last
            alone; None for nothing.
        reshard_after_forward: Whether gathered parameters of a layer are freed after its forward.
        wrap: Classes of the layers that are gathered as a whole; empty for those that transformers names.
        shard_size: Under ``hsdp`` how many GPUs divide the weights; every group of so many has them all. 0 for the
            others.
        options: Further settings of the strategy, by the names that its library gives them.
    """

    gpus: int
    strategy: str
    offload: Offload | None = None
    reshard_after_forward: bool = True
    wrap: tuple[str, ...] = ()
    shard_size: int = 0
    options: tuple[tuple[str, Hashable], ...] = ()

    def option(self, name: str, default: Any) -> Any:
        """A further setting, or its default."""
        return dict(self.options).get(name, default)

    @property
    def unmeasured(self) -> str:
        """What no measurement stands behind; empty where one does."""
        most = MEASURED_ON.get(self.strategy)
        if most and self.gpus <= most:
            return ""
        beyond = f" on more than {most} GPUs" if most else ""
        return f"no measured step with {self.strategy}{beyond} was compared with such figures"

    def __str__(self) -> str:
        offloaded = f", {self.offload} offload" if self.offload else ""
        groups = f" in groups of {self.shard_size}" if self.shard_size else ""
        return f"{self.gpus} GPUs, {self.strategy}{groups}{offloaded}"


Seen = Literal["same batch", "same batch, rounded", "fewer weights", "shorter texts"]
"""What training sees of a change, the least first: nothing but micro-batches and what is computed twice; numbers that
are kept in fewer bits; an adapter with fewer parameters; other data."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """What a change, or several at once, would make of the peak, and what it costs.

    Attributes:
        changes: The changes, each as one would write it.
        peak_allocated: Bytes.
        flops: Operations of one optimizer step, for as many sequences as now.
        learner: What training sees of it.
        smaller_rank: Whether it does nothing but lower the rank.
    """

    changes: tuple[str, ...]
    peak_allocated: int
    flops: int
    learner: Seen = "same batch"
    smaller_rank: bool = False

    @property
    def change(self) -> str:
        """All of it in one line."""
        return " with ".join(self.changes)
