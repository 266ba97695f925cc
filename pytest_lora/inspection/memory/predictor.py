"""Memory of the steps of one base and adapter, at any batch size, sequence length and rank."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from pytest_lora.facts.byte_sizes import format_bytes
from pytest_lora.facts.memory import MemoryEstimate, StepSetting, Unmodelled
from pytest_lora.facts.operations import StepFlops
from pytest_lora.facts.parallel import FSDP
from pytest_lora.inspection.memory.batches import has_tokens
from pytest_lora.inspection.memory.beside_torch import CUDA_CONTEXT, communication_of
from pytest_lora.inspection.memory.compiled_replay import fastest_replay
from pytest_lora.inspection.memory.cuda_allocator import plainly_replayed
from pytest_lora.inspection.memory.cut_bases import KeptBases
from pytest_lora.inspection.memory.dry_run import NotTracedError
from pytest_lora.inspection.memory.estimate import StepShape
from pytest_lora.inspection.memory.families import numbers_of, shares_of, thresholds_of
from pytest_lora.inspection.memory.fused_layers import FORMULAS as LAYER_FORMULAS
from pytest_lora.inspection.memory.fused_losses import FORMULAS as LOSS_FORMULAS
from pytest_lora.inspection.memory.images import reads_images
from pytest_lora.inspection.memory.layer_stacks import USUAL, Cut
from pytest_lora.inspection.memory.meta_model import MetaModel, build
from pytest_lora.inspection.memory.parallel.placed import moved_between_gpus
from pytest_lora.inspection.memory.parallel.strategies import cuts_of
from pytest_lora.inspection.memory.patience import limited, require_few
from pytest_lora.inspection.memory.sizes import Family, Point
from pytest_lora.inspection.memory.step import Step, assemble
from pytest_lora.inspection.memory.storage_tracker import quiet
from pytest_lora.inspection.memory.surfaces import Answer, Surfaces, Traced, answer_of
from pytest_lora.inspection.memory.timeline import NotRepeatingError
from pytest_lora.inspection.quiet import collector, unexplained
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.transformers_internals import runs_images_without_values

if TYPE_CHECKING:
    from peft import LoraConfig

WORTH_FITTING = 3.0
"""Seconds of the processor for a trace up to which further ones for a surface are worth the wait."""

LONG = 200_000
"""Events from which the compiled replay of the allocator is worth loading at once."""

COMPILE_AFTER = 8
"""Replays of the allocator in Python before a compiled one is used, which takes as long to load as about eight
of a 7B."""

_CUTS = (Cut(before=1, after=0), USUAL, Cut(together=0))
"""How layers are cut, in the order in which that is tried: none at last."""


class Predictor:
    """Predicts: the first points asked are traced, further ones of the same kind are interpolated.

    Args:
        base: A live model, a ``PretrainedConfig``, or a path.
        config: The adapter.
        setting: Everything else; its batch size and sequence length do not matter.
        kept: Bases that predictors of the same ``base`` share.

    Raises:
        TypeError, ValueError: See ``meta_model.build``.
    """

    _replays = 0
    """Of all predictors: compiling is worth it once for all of them."""

    def __init__(
        self, base: Any, config: LoraConfig, setting: StepSetting, kept: KeptBases | None = None
    ) -> None:
        self.setting = setting
        self._kept = kept
        self._base = base
        self._config = config
        self._thresholds = thresholds_of(base)
        self._shares = shares_of(setting)
        self._models: dict[int, MetaModel] = {}
        self._traced: dict[Point, Traced] = {}
        self._surfaces = Surfaces(self._family, self._traced, self._trace, self._step, numbers_of(base))
        self._asked: Point | None = None
        self._quickest = float("inf")  # the first trace imports what it needs
        self._cuts = iter(_CUTS if setting.parallel is None else map(Cut, cuts_of(setting.parallel)))
        self._cut = next(self._cuts)

    def _family(self, point: Point) -> Family:
        return Family(point, self._thresholds, self._shares)

    @unexplained()
    def peak_allocated(self, batch_size: int, seq_len: int, rank: int) -> int:
        """Bytes that ``torch.cuda.max_memory_allocated`` would give."""
        found = self._at((batch_size, seq_len, rank))
        return found.shape.peak_allocated(found.sizes)

    @unexplained()
    def peak_reserved(self, batch_size: int, seq_len: int, rank: int) -> int:
        """Bytes that ``torch.cuda.max_memory_reserved`` would give."""
        return self._reserved(self._at((batch_size, seq_len, rank)))

    @unexplained()
    def flops(self, batch_size: int, seq_len: int, rank: int) -> StepFlops:
        """Floating-point operations of one optimizer step."""
        point = (batch_size, seq_len, rank)
        return self._at(point).flops or self._trace(point).step.flops

    @unexplained()
    def estimate(self, batch_size: int, seq_len: int, rank: int) -> MemoryEstimate:
        """Everything about one step."""
        point = (batch_size, seq_len, rank)
        found = self._at(point)
        figures = found.shape.figures(found.sizes)
        model = next(iter(self._models.values())).transformer
        shared = self.setting.parallel
        return MemoryEstimate(
            setting=replace(self.setting, batch_size=batch_size, seq_len=seq_len),
            architecture=type(model).__name__,
            rank=point[2],
            peak_allocated=figures.peak_allocated,
            peak_reserved=self._reserved(found),
            after_step=figures.after_step,
            loaded=figures.loaded,
            loading=figures.loading,
            breakdown=figures.breakdown,
            peak_phase=figures.peak_phase,
            peak_operation=figures.peak_operation,
            timeline=figures.timeline,
            training_peak=figures.training_peak,
            evaluation_peak=figures.evaluation_peak,
            paged=found.paged,
            cuda_context=CUDA_CONTEXT,
            flops=found.flops or self.flops(*point),
            has_tokens=has_tokens(model),
            over_ranks=found.shape.over_gpus(found.sizes, shared.gpus) if shared else 0,
            communication=communication_of(shared),
            by_formula=self._by_formula(),
            unmodelled=(
                *_of_adapter(self._config),
                *_unmodelled(
                    replace(self.setting, batch_size=batch_size, seq_len=seq_len), model, figures.breakdown
                ),
            ),
        )

    def _by_formula(self) -> tuple[str, ...]:
        rank = next(iter(self._models.values())).rank
        shared = rank.by_formula if rank is not None else ()
        loss = (LOSS_FORMULAS[self.setting.loss],) if self.setting.loss != "full" else ()
        layers = LAYER_FORMULAS[self.setting.kernels] if self.setting.kernels else ()
        return (*shared, *loss, *layers)

    def _reserved(self, found: Answer) -> int:
        Predictor._replays += 1
        soon = Predictor._replays > COMPILE_AFTER or len(found.shape.line.index) > LONG
        replay = fastest_replay() if soon else plainly_replayed
        shared = self.setting.parallel
        late = shared is not None and shared.strategy == "fsdp1"
        return found.shape.peak_reserved(found.sizes, replay, emptied=self.setting.empty_cache, late=late)

    def _at(self, point: Point) -> Answer:
        self._asked = point
        if point not in self._traced:
            # Losses in chunks make as many as there are tokens for.
            if self._quickest < WORTH_FITTING and self.setting.loss == "full":
                self._surfaces.learn(point)
            found = self._surfaces(point)
            if found is not None and point not in self._traced:
                return found
        return answer_of(self._trace(point))

    def _trace(self, point: Point) -> Traced:
        if point not in self._traced:
            try:
                step = self._step(point)
                known = next((known for known in self._traced.values() if known.is_like(step)), None)
                traced = Traced(StepShape(step) if known is None else known.shape, step)
            except (NotRepeatingError, NotTracedError):  # some models count their layers, or address them
                if not self._cut.together or not any(built.stacks for built in self._models.values()):
                    raise
                self._cut = next(self._cuts)
                self._models.clear()
                return self._trace(point)
            self._traced[point] = traced
        return self._traced[point]

    def _step(self, point: Point) -> Step:
        batch_size, seq_len, rank = point
        setting = replace(self.setting, batch_size=batch_size, seq_len=seq_len)
        model = self._base if isinstance(self._base, nn.Module) else None
        # The step runs on the meta device, so the values of a live model are out of its reach.
        with Keeper(model, values=False), collector.paused():
            asked = self._asked or point
            kind = type(getattr(self._base, "config", self._base)).__name__
            with limited(_in_words(kind, asked, point)) as wait:
                built = self._model(rank)
                wait.what = _in_words(type(built.transformer).__name__, asked, point)
                since = time.thread_time()  # on a busy machine a trace is not longer, it only waits
                step = assemble(built, setting)
        require_few(wait.what, step.whole_length())
        self._quickest = min(self._quickest, time.thread_time() - since)
        return step

    def _model(self, rank: int) -> MetaModel:
        if rank not in self._models:
            config = copy.copy(self._config)
            config.r = rank
            with quiet():
                built = build(self._base, config, self.setting, cut=self._cut, kept=self._kept)
            self._models = dict([*self._models.items()][-1:]) | {rank: built}
        return self._models[rank]


def _in_words(architecture: str, asked: Point, traced: Point) -> str:
    """The step that was asked for, and the one that is traced where it is another."""
    step = f"a step of {architecture}, batch {asked[0]} x {asked[1]}, r={asked[2]}"
    if traced == asked:
        return step
    return f"{step} (from how it grows, seen at batch {traced[0]} x {traced[1]}, r={traced[2]})"


_IN_FLOAT32 = 2
"""Bytes of a number in float32 for each in the smallest dtype of adapters, which are 16 bits."""


def _of_adapter(config: LoraConfig) -> Iterator[Unmodelled]:
    if getattr(config, "alora_invocation_tokens", None):
        yield Unmodelled("that an activated LoRA leaves the tokens before its invocation alone is", "at most")
        yield Unmodelled("copies of the tokens after it are", "at least")


def _unmodelled(setting: StepSetting, model: nn.Module, breakdown: Mapping[str, int]) -> Iterator[Unmodelled]:
    asked: dict[str, Any] = dict(setting.args)
    if setting.images and reads_images(model) and not runs_images_without_values():
        yield Unmodelled(
            "images, which transformers 4 compares with the text by their values, are", "at least"
        )
    if asked.get("activation_offloading"):
        yield Unmodelled("activations that are moved to the host are", "at most")
    if setting.kernels == "liger":
        yield Unmodelled("that Liger rotates queries and keys in place is", "at most")
    evaluation = setting.evaluation
    held = evaluation is not None and evaluation.keeps != "loss" and setting.trainer != "trl-grpo"
    if evaluation is not None and held and evaluation.batches is None:
        yield Unmodelled(
            f"{evaluation.keeps} of further batches of the evaluation, which stay on the GPU without "
            "eval_accumulation_steps, are",
            "at least",
        )
    if setting.trainer == "trl-grpo":
        yield from _generation(asked, getattr(model, "config", None), setting)
    shared = setting.parallel
    if shared is not None and shared.strategy in FSDP and setting.accumulation > 1:
        # Every trained parameter is an adapter here; FSDP keeps a gradient in float32 at most.
        kept = _IN_FLOAT32 * (shared.shard_size or shared.gpus) * breakdown.get("adapters", 0)
        yield Unmodelled("gradients that no_sync keeps whole between micro-batches are", "at least", kept)
    if shared is not None and shared.strategy == "device_map":
        moved = moved_between_gpus(getattr(model, "config", None), setting)
        yield Unmodelled(
            "hidden states and logits that accelerate copies to another GPU are", "at least", moved
        )
    packed = setting.quantization
    if packed is not None and not packed.by_bitsandbytes:
        yield Unmodelled(f"kernels of {packed.method} that unpack a weight in parts are", "at most")
    if packed is not None and packed.method == "mxfp4":
        yield Unmodelled(
            "that transformers trains mxfp4 only with Mxfp4Config(dequantize=True) is", "at least"
        )


def _generation(asked: Mapping[str, Any], config: Any, setting: StepSetting) -> Iterator[Unmodelled]:
    """What generates completions for GRPO: the model itself between steps, vLLM beside it, or a server elsewhere."""
    if asked.get("use_vllm"):
        if asked.get("vllm_mode") != "server":
            share = asked.get("vllm_gpu_memory_utilization")
            words = f", which is given {100 * share:g} % of the GPU," if share else ""
            yield Unmodelled(f"vLLM on the same GPU{words} is", "at least")
        return
    batches = asked.get("steps_per_generation") or setting.accumulation
    cache = batches * _cache_of_generation(config, setting)
    words = f", whose keys and values take {format_bytes(cache)} or more beside the weights," if cache else ""
    yield Unmodelled(f"generation{words} is", "at least")


def _cache_of_generation(config: Any, setting: StepSetting) -> int:
    """Bytes of keys and values of a batch of sequences, two bytes a number; 0 where they are not known."""
    text = getattr(config, "text_config", config)
    layers, heads = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(text, "hidden_size", None)
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int)):
        return 0
    groups: int = getattr(text, "num_key_value_heads", None) or heads
    each: int = getattr(text, "head_dim", None) or width // heads
    return 2 * 2 * layers * groups * each * setting.batch_size * setting.seq_len
