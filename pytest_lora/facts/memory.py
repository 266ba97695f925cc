"""Memory of one training step, as facts: what is asked, what is predicted, what else was tried."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pytest_lora.facts.memory_choices import (
    Alternative,
    Attention,
    Evaluation,
    Kernels,
    Loss,
    Parallel,
    TimelinePoint,
    peak_rows,
)
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.facts.operations import NO_FLOPS, StepFlops, operation_in_words

Bound = Literal["at least", "at most"]
Checkpointing = bool | Literal["reentrant"]

AMPERE_WORKSPACE = 8_519_680
"""Bytes of one workspace of cuBLAS on Ampere and Ada (torch's ``CUBLAS_WORKSPACE_CONFIG``); on Hopper 32 MiB."""

BITSANDBYTES = ("nf4", "fp4", "int8")
"""Methods of bitsandbytes."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers of the base are stored: by bitsandbytes, or packed already in the checkpoint.

    Attributes:
        method: ``"nf4"``, ``"fp4"`` or ``"int8"`` of bitsandbytes; ``"gptq"``, ``"awq"``, ``"fp8"`` or ``"mxfp4"``.
        double_quant: Whether the scales of 4-bit blocks are quantized too.
        storage: Dtype that packs 4-bit numbers.
        compute_dtype: Dtype that 4-bit layers compute in.
        skip_modules: Layers that stay whole, besides those that transformers keeps whole.
        bits: Bits of a number, of GPTQ and AWQ.
        group_size: Numbers of a row that share a scale, of GPTQ and AWQ; None for the whole row.
        block_size: Rows and columns that share a scale, of FP8; None for the whole matrix.
    """

    method: str
    double_quant: bool = False
    storage: str = "uint8"
    compute_dtype: str = "bfloat16"
    skip_modules: tuple[str, ...] = ()
    bits: int = 4
    group_size: int | None = None
    block_size: tuple[int, int] | None = None

    @property
    def by_bitsandbytes(self) -> bool:
        """Whether bitsandbytes packs the weights, when the model is loaded."""
        return self.method in BITSANDBYTES


@dataclass(frozen=True, slots=True)
class StepSetting:
    """Everything about a training step, the base and the adapter aside, that decides its memory.

    Attributes:
        batch_size: Sequences in one micro-batch.
        seq_len: Tokens in each.
        quantization: How the base is quantized; None if it is not.
        dtype: Dtype of the base's unquantized weights.
        adapter_dtype: Dtype of the adapter's weights.
        images: Images in each sequence, of models that read text and images.
        image_size: Height and width of an image in pixels; None for the model's own.
        trainer: What runs the step: ``"transformers"``, ``"trl-sft"`` and the like, ``"loop"``; empty for a step
            that is described by the other fields alone.
        args: Fields of the trainer's arguments, for its loss.
        padding_free: Whether the sequences of a batch are put into one row.
        frozen: Parameters of the adapter that are not trained: of every layer (``"lora_A"``), or by whole names.
        gradient_checkpointing: ``False``, ``True`` (non-reentrant) or ``"reentrant"``.
        optimizer: Name as in ``TrainingArguments(optim=...)``.
        padding_mask: Whether batches hold padding, so that attention needs a mask.
        accumulation: Micro-batches to one optimizer step.
        outputs_held: Whether the training loop keeps the model's outputs until the step has ended.
        prepare_for_kbit: Whether ``prepare_model_for_kbit_training`` casts what is not quantized to float32.
        upcast: Parts of parameter names; what has one of them is in float32.
        autocast: Dtype of the ``torch.autocast`` that the forward runs under; empty where it runs under none.
        use_cache: Whether the model keeps keys and values for generation.
        empty_cache: Whether the training loop empties the allocator's cache between steps.
        workspace: Bytes of a workspace of cuBLAS, of which the forward has one and the backward another.
        attention: Kernel of scaled dot product attention without a mask.
        parallel: How several GPUs share the step; None for one.
        evaluation: What is run between the steps; None for nothing.
        loss, kernels: Whose loss and fused kernels run in place of the model's own.
    """

    batch_size: int
    seq_len: int
    quantization: Quantization | None = None
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    gradient_checkpointing: Checkpointing = False
    optimizer: str = "adamw_torch"
    padding_mask: bool = False
    accumulation: int = 1
    outputs_held: bool = False
    prepare_for_kbit: bool = False
    upcast: tuple[str, ...] = ()
    autocast: str = ""
    use_cache: bool = False
    empty_cache: bool = False
    workspace: int = AMPERE_WORKSPACE
    attention: Attention = "flash"
    frozen: tuple[str, ...] = ()
    images: int = 1
    image_size: int | tuple[int, int] | None = None
    trainer: str = ""
    args: tuple[tuple[str, Hashable], ...] = ()
    padding_free: bool = False
    parallel: Parallel | None = None
    evaluation: Evaluation | None = None
    loss: Loss = "full"
    kernels: Kernels | None = None

    @property
    def by_accelerate(self) -> bool:
        """Whether accelerate prepares the model, which under autocast hands on its outputs in float32."""
        return bool(self.autocast) and self.trainer != "loop"

    @property
    def by_trl(self) -> bool:
        """Whether a trainer of TRL computes the loss."""
        return self.trainer.startswith("trl-")


class Unmodelled(NamedTuple):
    """Something that a prediction leaves out, and so what it is: ``"at least"`` or ``"at most"`` what is needed."""

    what: str
    bound: Bound
    most: int | None = None
    """Bytes that the part needs at most, where that is known."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Predicted GPU memory of a training step, in bytes.

    Attributes:
        setting: What was asked.
        architecture: Class of the base model.
        rank: ``r`` of the adapter.
        peak_allocated: What ``torch.cuda.max_memory_allocated`` would say, without the rests of blocks that CUDA's
            allocator does not split: at most 1 MiB each, 0 to 0.5 % of 33 published steps.
        peak_reserved: What ``torch.cuda.max_memory_reserved`` would say, with the allocator's own rounding.
        loaded: Allocated once the model is loaded, before the first step.
        loading: Allocated at most until a model is divided, where it is only after it came onto the GPU: FSDP1 cuts it
            unit by unit, ZeRO-3 divides a quantized one that each GPU has as a whole. 0 for the others.
        after_step: Allocated between two steps: weights, quantization statistics, optimizer state.
        breakdown: Bytes by category at the peak; they add up to ``peak_allocated``.
        peak_phase: ``"forward"``, ``"backward"``, ``"optimizer"`` or ``"evaluation"``.
        peak_operation: The operation whose result makes the peak.
        timeline: Peak of each stretch of the step, in order.
        paged: Optimizer state in unified memory, which the allocator does not count.
        cuda_context: What the CUDA context takes beside it, a rough figure; ``nvidia-smi`` counts it.
        communication: What NCCL takes beside it on each of several GPUs, as published for A100s with NVLink.
        flops: Floating-point operations of one optimizer step.
        has_tokens: Whether the step has tokens at all; with images alone, their length means nothing.
        unmodelled: What is left out, which makes the figures a bound.
        over_ranks: With several GPUs the peaks of all of them together; 0 with one.
        by_formula: Parts of a step that are computed, where the library's own code cannot run.
        training_peak: That of the training alone; 0 for no evaluation.
        evaluation_peak: That of the evaluation alone; 0 for none.
    """

    setting: StepSetting
    architecture: str
    rank: int
    peak_allocated: int
    peak_reserved: int
    loaded: int
    after_step: int
    breakdown: Mapping[str, int]
    peak_phase: str
    peak_operation: str
    timeline: tuple[TimelinePoint, ...]
    paged: int
    cuda_context: int
    flops: StepFlops = NO_FLOPS
    has_tokens: bool = True
    unmodelled: tuple[Unmodelled, ...] = ()
    over_ranks: int = 0
    by_formula: tuple[str, ...] = ()
    training_peak: int = 0
    evaluation_peak: int = 0
    loading: int = 0
    communication: int = 0

    @property
    def peak_loading(self) -> int:
        """Allocated at most before the first step."""
        return max(self.loaded, self.loading)

    @property
    def most_allocated(self) -> int:
        """Allocated at most, loading and the step together."""
        return max(self.peak_allocated, self.peak_loading)

    @property
    def beside_torch(self) -> int:
        """What the device needs beside torch's allocator, roughly."""
        return self.cuda_context + self.communication

    @property
    def on_device(self) -> int:
        """What ``nvidia-smi`` would show at most, roughly: all that is reserved, CUDA's context and NCCL."""
        return self.peak_reserved + self.beside_torch

    @property
    def bound(self) -> Literal["at least", "at most", "about"] | None:
        """What the figures are where something is not modelled; None where they are meant as they stand."""
        bounds = {part.bound for part in self.unmodelled}
        if not bounds:
            return None
        return bounds.pop() if len(bounds) == 1 else "about"

    def fits(self, budget: int) -> bool:
        """Whether what is allocated stays within so many bytes; a bound says no more than it can."""
        return self.most_allocated <= budget

    @property
    def is_mostly_whole(self) -> bool:
        """Whether quantization leaves more bytes of the base whole, embeddings and head aside, than it packs.

        Where weights lie in the host's memory, what is on the GPU says nothing of them.
        """
        if self.setting.parallel is not None and self.setting.parallel.offload == "cpu":
            return False
        packed = self.breakdown.get("quantized base weights", 0)
        packed += self.breakdown.get("parameter shards", 0)  # packed and whole ones share them
        return self.setting.quantization is not None and self.breakdown.get("base weights", 0) > packed

    @property
    def batch(self) -> str:
        """``"batch 4 x 2048 tokens"``."""
        size = f"batch {self.setting.batch_size}"
        return f"{size} x {self.setting.seq_len} tokens" if self.has_tokens else size

    @property
    def peak_in_words(self) -> str:
        """``"backward of layer 31: matrix product"``."""
        at = next((p.layer for p in self.timeline if p.peak == self.peak_allocated), None)
        layer = "" if at is None else f" of layer {at}"
        return f"{self.peak_phase}{layer}: {operation_in_words(self.peak_operation)}"

    def __str__(self) -> str:
        rows = [
            *peak_rows(self.evaluation_peak, self.training_peak, self.peak_allocated),
            *((f"  {name}", size) for name, size in self.breakdown.items()),
            ("peak reserved", self.peak_reserved),
            ("between steps", self.after_step),
            *((("optimizer state in paged memory", self.paged),) if self.paged else ()),
            *((("while it is loaded", self.loading),) if self.loading > self.peak_allocated else ()),
            ("CUDA context beside it, roughly", self.cuda_context),
            *((("NCCL beside it, roughly", self.communication),) if self.communication else ()),
            *((("peaks of all GPUs together", self.over_ranks),) if self.over_ranks else ()),
        ]
        left_out = [
            "quantization packs linear layers; the larger part of this base, fused experts for one, stays whole"
        ] * self.is_mostly_whole
        left_out += [f"{part.bound} this: {part.what} not modelled" for part in self.unmodelled]
        left_out += [f"by formula: {part}" for part in self.by_formula]
        if self.setting.parallel is not None and self.setting.parallel.unmeasured:
            left_out.append(f"without a measurement: {self.setting.parallel.unmeasured}")
        width = max(len(name) for name, _ in rows)
        beside = self.setting.evaluation
        evaluation = f" and {beside.in_words(with_tokens=self.has_tokens)}," if beside else ""
        shared = f"; the fullest of {self.setting.parallel}" if self.setting.parallel else ""
        head = (
            f"a training step{evaluation} of {self.architecture}, {self.batch}, "
            f"r={self.rank}{shared}; peak in the {self.peak_in_words}"
        )
        return "\n".join(
            (head, *(f"{name.ljust(width)}  {format_bytes(size):>10s}" for name, size in rows), *left_out)
        )


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """A predicted step, the memory there is, and what else was tried.

    Attributes:
        estimate: The prediction.
        budget: Bytes of GPU memory.
        alternatives: The smallest change first; empty where the step fits.
    """

    estimate: MemoryEstimate
    budget: int
    alternatives: tuple[Alternative, ...] = ()
