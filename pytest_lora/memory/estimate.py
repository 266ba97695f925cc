"""Predicted GPU memory of a training step, without a GPU and without weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from pytest_lora.facts.memory import MemoryEstimate, Unmodelled
from pytest_lora.facts.memory_choices import SHARDED, TrainerFields
from pytest_lora.facts.operations import StepFlops
from pytest_lora.memory import StepArguments, names_settings
from pytest_lora.memory.kept import predictor_for
from pytest_lora.memory.parallel import with_what_is_said
from pytest_lora.memory.setting import checked_setting, declared_quantization, require_point
from pytest_lora.memory.trainer import not_modelled, read_arguments

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig

    from pytest_lora.inspection.memory.predictor import Predictor

    Base: TypeAlias = nn.Module | PretrainedConfig | str | os.PathLike[str]


@names_settings
def estimate_memory(
    config: LoraConfig,
    base: Base,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    **setting: Unpack[StepArguments],
) -> MemoryEstimate:
    """Predict the GPU memory of one training step.

    The installed code of transformers, bitsandbytes and PEFT runs the step on tensors without values, every
    storage is followed from its making to its end, and CUDA's caching allocator is replayed over it. Layers
    that are like their neighbours are run once and counted often. Nothing is read, downloaded or changed.

    Args:
        config: The adapter. It and the base are understood in either order.
        base: A live model without adapter, a ``PretrainedConfig``, the path of a model folder or ``config.json``, or
            the name of a public model. What DDP, FSDP and ``torch.compile`` add or save is not counted, and said.
        batch_size: Sequences (or images, or pairs of preference tuning) in a micro-batch, at least 1.
        seq_len: Tokens in each, padding included, at least 1; of audio, frames of the encoder.
        quantization: ``"nf4"``, ``"fp4"`` (4 bits, no double quantization), ``"int8"``, a
            ``BitsAndBytesConfig``, or None for a base in ``dtype``, or as its own ``quantization_config`` says
            (GPTQ, AWQ, FP8, MXFP4, bitsandbytes).
        dtype: Dtype of the unquantized weights: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        gradient_checkpointing: ``False``, ``True`` (non-reentrant) or ``"reentrant"``; None as the trainer does by
            default, which is off but for TRL.
        optimizer: As in ``TrainingArguments(optim=...)``.
        padding_mask: Whether batches hold padding: attention then needs a mask, and another kernel.
        accumulation: Micro-batches to one optimizer step.
        outputs_held: Whether the loop keeps the model's outputs (logits) while it goes backward. The Trainer
            does not; a loop does.
        prepare_for_kbit: Whether PEFT's ``prepare_model_for_kbit_training`` is called, which casts what is not
            quantized to float32. Default: yes if the base is quantized, unless FSDP divides it.
        upcast: Parts of parameter names: what has one of them is in float32, as ``["norm"]`` where norms alone are
            cast. Default: none.
        autocast: Whether the forward runs under ``torch.autocast``, as in the Trainer with ``bf16=True`` or
            ``fp16=True``, or the dtype of it. Default: yes where ``dtype`` is one of these.
        adapter_dtype: Dtype of the adapter: PEFT keeps it in ``"float32"`` unless
            ``autocast_adapter_dtype=False``; it holds for gradients and optimizer states too.
        use_cache: Whether the model keeps keys and values for generation while it trains.
        empty_cache: Whether the loop calls ``torch.cuda.empty_cache`` between steps.
        workspace: Bytes of a workspace of cuBLAS, of which forward and backward have one each: 8,519,680 on Ampere and
            Ada, ``"32MiB"`` on Hopper. Default: that of the GPU on which a live base lies, else 8,519,680.
        attention: Kernel that PyTorch's attention takes without a mask: ``"flash"``, ``"cudnn"``, ``"efficient"`` or
            ``"math"``, which holds the scores. Default: what PyTorch chooses on that GPU, else ``"flash"``. With a
            mask it is the memory-efficient one.
        images: Images in each sequence, where the model reads text and images; 0 for text alone.
        image_size: Pixels of an image's edge, or its height and width, where the model takes more than its own
            ``vision_config.image_size``; models of any resolution are asked with 448.
        trainer: What runs the step. ``"trl-sft"``, ``"trl-dpo"``, ``"trl-reward"``, ``"trl-grpo"``: the loss of
            the installed TRL runs, and what it sets up by default counts (checkpointing, adapters of QLoRA in
            bfloat16, no ``prepare_model_for_kbit_training``). ``"transformers"``: the Trainer, which is what the
            defaults describe. ``"loop"``: a loop of one's own, which holds the outputs and has no autocast.
        args: A ``TrainingArguments``, ``SFTConfig``, ``DPOConfig``, ``RewardConfig`` or ``GRPOConfig``: trainer,
            batch, length, accumulation, optimizer, precision, checkpointing, packing and the loss are read from
            it; what is given here as well counts instead.
        padding_free: Whether the sequences of a batch are put into one row, as packing does.
        gpus: How many GPUs share the step; the figures are those of the fullest. Default: 1, or as ``parallel`` says.
        strategy: How they share it: ``"ddp"`` (the default), ``"fsdp1"``, ``"fsdp2"`` (or ``"fsdp"``), ``"hsdp"``,
            ``"zero1"``, ``"zero2"``, ``"zero3"``, ``"tp"`` (transformers' own tensor parallelism), ``"device_map"``
            (``device_map="auto"``: layers one after the other over the GPUs). FSDP, tensor parallelism and the
            planner of accelerate run as they are installed; what is by formula says so (``by_formula``).
        offload: What lies in the host's memory: ``"cpu"`` (parameters, gradients, optimizer; FSDP and ZeRO-3) or
            ``"optimizer"`` (ZeRO).
        reshard_after_forward: Whether FSDP frees the gathered parameters of a layer after its forward; default True.
        wrap: Classes of the layers that FSDP gathers as a whole; default: those that transformers names.
        shard_size: Under ``"hsdp"`` how many GPUs divide the weights: a divisor of ``gpus``, default 8, a machine.
        parallel: An accelerate configuration or a DeepSpeed JSON as a path, or the mapping in it, or FSDP arguments;
            it says the five above, and its precision and checkpointing of layers are ``autocast`` and
            ``gradient_checkpointing`` where these are not given.
        evaluation: ``Evaluation(batch_size=8)``, which runs between the steps; with ``compute_metrics`` it has
            ``keeps="logits"``. The larger of both is the peak, and the estimate says which. Default: none, or as
            ``args`` has it (``eval_strategy``, ``per_device_eval_batch_size``, ``eval_accumulation_steps``), keeping
            the loss.
        loss: ``"full"``: all logits at once, as models compute it. ``"chunked"``: the chunked
            ``linear_cross_entropy`` of torch 2.13. ``"liger"``: Liger's fused linear cross entropy. ``"cut"``: cut
            cross entropy (Axolotl's plugin). These three are computed from what their code keeps (``by_formula``).
            TRL has its own, in tiles, and takes ``"chunked"`` alone.
        kernels: Fused kernels of the layers: ``"liger"`` (RMSNorm, SwiGLU, and its loss unless ``loss="full"``) or
            ``"axolotl"`` (its LoRA kernels); they are computed like the loss.
        frozen: Parameters of the adapter that are not trained: ``["lora_A"]`` as in LoRA-FA, or whole names in
            the base. ``optimizer="lorafa"``, PEFT's own, freezes them by itself.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, the base cannot be built, PEFT refuses the
            configuration, or the model does something that needs values; the message names it.
    """
    read = read_arguments(setting["args"]) if setting.get("args") is not None else {}
    point = {"batch_size": batch_size, "seq_len": seq_len}
    point = {name: read.get(name) if value is None else value for name, value in point.items()}
    for name, value in point.items():
        if value is None:
            raise TypeError(f"estimate_memory needs {name}=, or args= of a trainer that have it")
    batch_size, seq_len, _ = require_point(**point)
    return step_memory(config, base, **setting).estimate(batch_size, seq_len)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Memory of one base and adapter at any batch size, sequence length and rank, in bytes.

    The first points asked are traced, a few tenths of a second each; then a fit over a dozen traces answers,
    exactly and in a fraction of a millisecond (``peak_allocated``) or some ten (the others).

    Attributes:
        rank: ``r`` where none is given.
    """

    _predictor: Predictor
    rank: int
    _left_out: tuple[Unmodelled, ...] = ()

    def peak_allocated(self, batch_size: int, seq_len: int, r: int | None = None) -> int:
        """What ``torch.cuda.max_memory_allocated`` would say."""
        return self._predictor.peak_allocated(*self._point(batch_size, seq_len, r))

    def most_allocated(self, batch_size: int, seq_len: int, r: int | None = None) -> int:
        """The same, or what loading takes where that is more: what has to fit."""
        return self._predictor.most_allocated(*self._point(batch_size, seq_len, r))

    def peak_reserved(self, batch_size: int, seq_len: int, r: int | None = None) -> int:
        """What ``torch.cuda.max_memory_reserved`` would say."""
        return self._predictor.peak_reserved(*self._point(batch_size, seq_len, r))

    def flops(self, batch_size: int, seq_len: int, r: int | None = None) -> StepFlops:
        """Floating-point operations of one optimizer step, as torch's ``FlopCounterMode`` counts them."""
        return self._predictor.flops(*self._point(batch_size, seq_len, r))

    def estimate(self, batch_size: int, seq_len: int, r: int | None = None) -> MemoryEstimate:
        """Everything about one step."""
        return _with(self._left_out, self._predictor.estimate(*self._point(batch_size, seq_len, r)))

    def once(self, batch_size: int, seq_len: int) -> MemoryEstimate:
        """As ``estimate``, where it is not followed by others, so that nothing is learned for them."""
        point = self._point(batch_size, seq_len, None)
        return _with(self._left_out, self._predictor.estimate(*point, ahead=False))

    def _point(self, batch_size: int, seq_len: int, r: int | None) -> tuple[int, int, int]:
        return require_point(batch_size, seq_len, self.rank if r is None else r)


@names_settings
def step_memory(config: LoraConfig, base: Base, **setting: Unpack[StepArguments]) -> StepMemory:
    """The memory of one base and adapter at any batch size, sequence length and rank.

    For many estimates, which then share what they have in common.

    Args:
        config: The adapter.
        base: As for ``estimate_memory``.
        setting: The other arguments of ``estimate_memory``, ``batch_size`` and ``seq_len`` aside.

    Raises:
        TypeError, ValueError: As ``estimate_memory``.
    """
    from pytest_lora.inspection.skeleton import model_or_config

    base = model_or_config(base)
    given: dict[str, Any] = {
        **setting,
        **_answers(base, setting),
        "quantization": _as_stored(base, setting.get("quantization")),
    }
    if given.get("args") is not None and not isinstance(given["args"], TrainerFields):
        read = read_arguments(given["args"])
        given = {
            **{name: value for name, value in read.items() if name not in ("batch_size", "seq_len")},
            **given,
        }
        # What these do not switch on, a configuration may.
        said = with_what_is_said(given.get("parallel"), None, None)
        for name, value in zip(("gradient_checkpointing", "autocast"), said, strict=True):
            if setting.get(name) is None and not given[name] and value is not None:
                given[name] = value
    left_out = _left_out(base)
    if hasattr(given.get("args"), "per_device_train_batch_size"):
        left_out += not_modelled(given["args"], setting)
    by_args = setting.get("evaluation") is None and given.get("evaluation") is not None
    if by_args and _is_sharded(given):
        given["evaluation"] = None
        left_out += (Unmodelled("the evaluation, where weights are cut over several GPUs, is", "at least"),)
    return StepMemory(predictor_for(base, config, checked_setting(**given)), config.r, left_out)


def _is_sharded(given: Mapping[str, Any]) -> bool:
    shared = checked_setting(**{**given, "evaluation": None}).parallel
    return shared is not None and shared.strategy in SHARDED


def _left_out(base: Any) -> tuple[Unmodelled, ...]:
    if not hasattr(base, "modules"):
        return ()
    from pytest_lora.inspection.memory.live_model import left_out

    return left_out(base)


def _with(left_out: tuple[Unmodelled, ...], estimate: MemoryEstimate) -> MemoryEstimate:
    return replace(estimate, unmodelled=(*estimate.unmodelled, *left_out)) if left_out else estimate


def _as_stored(base: Any, asked: Any) -> Any:
    """The quantization that is asked for, or that a base has already.

    Raises:
        ValueError: Both, and not the same.
    """
    stored = declared_quantization(getattr(base, "config", base))
    if stored is None and hasattr(base, "modules"):
        from pytest_lora.inspection.memory.live_model import quantization_of_model

        stored = quantization_of_model(base)
    if getattr(asked, "dequantize", False):
        return None
    if stored is None:
        return asked
    if asked is None or (stored.by_bitsandbytes and checked_setting(quantization=asked).quantization):
        return stored
    raise ValueError(
        f"quantization: the base is stored in {stored.method} already; leave quantization out, or give a configuration "
        "with dequantize=True to have it unpacked"
    )


def _answers(base: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What the GPU of a live base answers for the arguments that are not given."""
    from pytest_lora.inspection.memory.live_model import of_model

    return {name: answer for name, answer in of_model(base)._asdict().items() if setting.get(name) is None}


def estimate_of_model(model: nn.Module, batch: Any) -> MemoryEstimate | None:
    """What ``estimate_memory`` says of a live model with an adapter and a batch for it, with AdamW.

    Returns:
        None where the model has no configuration to build from, or the batch no ``input_ids``.

    Raises:
        ValueError: The step cannot be traced.
    """
    from pytest_lora.inspection.memory.live_model import described

    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    if ids is None or ids.dim() != 2:
        return None
    found = described(model, int(ids.shape[0]), int(ids.shape[1]))
    if found is None:
        return None
    predictor = predictor_for(found.base, found.config, found.setting)
    estimate = predictor.estimate(found.setting.batch_size, found.setting.seq_len, found.config.r)
    return _with(_left_out(model), estimate)
