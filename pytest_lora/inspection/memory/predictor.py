"""Memory of the steps of one base and adapter, at any batch size, sequence length and rank."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pytest_lora.facts.byte_sizes import format_bytes
from pytest_lora.facts.memory import MemoryEstimate, StepSetting, Unmodelled
from pytest_lora.facts.operations import StepFlops
from pytest_lora.facts.parallel import FSDP
from pytest_lora.inspection.memory.batches import has_tokens
from pytest_lora.inspection.memory.compiled_replay import fastest_replay
from pytest_lora.inspection.memory.cuda_allocator import plainly_replayed
from pytest_lora.inspection.memory.dry_run import NotTracedError
from pytest_lora.inspection.memory.estimate import StepShape
from pytest_lora.inspection.memory.fused_layers import FORMULAS as LAYER_FORMULAS
from pytest_lora.inspection.memory.fused_losses import FORMULAS as LOSS_FORMULAS
from pytest_lora.inspection.memory.images import reads_images
from pytest_lora.inspection.memory.meta_model import MetaModel, build
from pytest_lora.inspection.memory.operations import FlopsSurface
from pytest_lora.inspection.memory.parallel.strategies import cuts_of
from pytest_lora.inspection.memory.patience import limited, require_few
from pytest_lora.inspection.memory.sizes import Family, Point, Surface, check_point, fitted, grid
from pytest_lora.inspection.memory.step import Step, assemble
from pytest_lora.inspection.memory.storage_tracker import quiet
from pytest_lora.inspection.memory.timeline import NotRepeatingError
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.transformers_internals import runs_images_without_values

if TYPE_CHECKING:
    from peft import LoraConfig

CUDA_CONTEXT = 512 * 2**20
"""Bytes that CUDA's context takes on the device beside the allocator; 0.4 to 0.6 GiB is usual."""

TOLERANCE = 0.0005
"""Share of the bytes by which an interpolated step may differ from a traced one."""

FIT_AFTER = 6
"""Points that are traced one by one before a surface is fitted, which takes a dozen traces."""

WORTH_FITTING = 3.0
"""Seconds of a trace up to which a dozen of them is worth the wait."""

LONG = 200_000
"""Events from which the compiled replay of the allocator is worth loading at once."""

COMPILE_AFTER = 8
"""Replays of the allocator in Python before a compiled one is used, which takes as long to load as about eight
of a 7B."""

_CUTS = (1, 0)
"""Layers that are cut at once, in the order in which they are tried: none at last."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window")


class Predictor:
    """Predicts: the first points asked are traced, further ones of the same kind are interpolated.

    Args:
        base: A live model, a ``PretrainedConfig``, or a path.
        config: The adapter.
        setting: Everything else; its batch size and sequence length do not matter.

    Raises:
        TypeError, ValueError: See ``meta_model.build``.
    """

    def __init__(self, base: Any, config: LoraConfig, setting: StepSetting) -> None:
        self.setting = setting
        self._base = base
        self._config = config
        self._thresholds = _thresholds(base)
        self._models: dict[int, MetaModel] = {}
        self._traced: dict[Point, tuple[StepShape, Step]] = {}
        self._surfaces: dict[Any, tuple[StepShape, Surface] | None] = {}
        self._flops: dict[Any, FlopsSurface] = {}
        self._asked: Counter[Any] = Counter()
        self._replays = 0
        self._slowest = 0.0
        self._cuts = iter(_CUTS if setting.parallel is None else cuts_of(setting.parallel))
        self._together = next(self._cuts)

    def peak_allocated(self, batch_size: int, seq_len: int, rank: int) -> int:
        """Bytes that ``torch.cuda.max_memory_allocated`` would give."""
        shape, sizes, _ = self._at((batch_size, seq_len, rank))
        return shape.peak_allocated(sizes)

    def peak_reserved(self, batch_size: int, seq_len: int, rank: int) -> int:
        """Bytes that ``torch.cuda.max_memory_reserved`` would give."""
        shape, sizes, _ = self._at((batch_size, seq_len, rank))
        return self._reserved(shape, sizes)

    def flops(self, batch_size: int, seq_len: int, rank: int) -> StepFlops:
        """Floating-point operations of one optimizer step."""
        point = (batch_size, seq_len, rank)
        surface = self._flops.get(Family(point, self._thresholds).key)
        found = None if surface is None or point in self._traced else surface(point)
        return found or self._trace(point)[1].flops

    def estimate(self, batch_size: int, seq_len: int, rank: int) -> MemoryEstimate:
        """Everything about one step."""
        point = (batch_size, seq_len, rank)
        shape, sizes, paged = self._at(point)
        figures = shape.figures(sizes)
        model = next(iter(self._models.values())).transformer
        return MemoryEstimate(
            setting=replace(self.setting, batch_size=batch_size, seq_len=seq_len),
            architecture=type(model).__name__,
            rank=point[2],
            peak_allocated=figures.peak_allocated,
            peak_reserved=self._reserved(shape, sizes),
            after_step=figures.after_step,
            loaded=figures.loaded,
            breakdown=figures.breakdown,
            peak_phase=figures.peak_phase,
            peak_operation=figures.peak_operation,
            timeline=figures.timeline,
            training_peak=figures.training_peak,
            evaluation_peak=figures.evaluation_peak,
            paged=paged,
            cuda_context=CUDA_CONTEXT,
            flops=self.flops(*point),
            has_tokens=has_tokens(model),
            over_ranks=shape.over_gpus(sizes, self.setting.parallel.gpus) if self.setting.parallel else 0,
            by_formula=self._by_formula(),
            unmodelled=tuple(
                _unmodelled(
                    replace(self.setting, batch_size=batch_size, seq_len=seq_len), model, figures.breakdown
                )
            ),
        )

    def _by_formula(self) -> tuple[str, ...]:
        rank = next(iter(self._models.values())).rank
        shared = rank.by_formula if rank is not None else ()
        loss = (LOSS_FORMULAS[self.setting.loss],) if self.setting.loss != "full" else ()
        layers = LAYER_FORMULAS[self.setting.kernels] if self.setting.kernels else ()
        return (*shared, *loss, *layers)

    def _reserved(self, shape: StepShape, sizes: NDArray[np.int64]) -> int:
        self._replays += 1
        soon = self._replays > COMPILE_AFTER or len(shape.line.index) > LONG
        replay = fastest_replay() if soon else plainly_replayed
        shared = self.setting.parallel
        late = shared is not None and shared.strategy == "fsdp1"
        return shape.peak_reserved(sizes, replay, emptied=self.setting.empty_cache, late=late)

    def _at(self, point: Point) -> tuple[StepShape, NDArray[np.int64], int]:
        family = Family(point, self._thresholds)
        surface = self._surfaces.get(family.key)
        if surface is None and point not in self._traced:
            self._asked[family.key] += 1
            if self._asked[family.key] > FIT_AFTER and self._slowest < WORTH_FITTING:
                surface = self._fit(family)
        if surface is not None:
            shape, fit = surface
            sizes = fit(point)
            return shape, sizes[:-1], int(sizes[-1])
        shape, step = self._trace(point)
        return shape, np.array(step.sizes), step.paged

    def _fit(self, family: Family) -> tuple[StepShape, Surface] | None:
        if family.key not in self._surfaces:
            steps: dict[Point, Step] = {}

            def sizes_at(point: Point) -> tuple[Any, NDArray[np.int64]]:
                step = steps[point] = self._step(point)
                return (step.events, step.units), np.array([*step.sizes, step.paged])

            found = fitted(family, sizes_at, TOLERANCE)
            shape = None if found is None else StepShape(next(iter(steps.values())))
            self._surfaces[family.key] = None if found is None or shape is None else (shape, found[1])
            if found is not None:
                counted = FlopsSurface(grid(family), [steps[point].flops for point in grid(family)])
                if counted(check_point(family)) == steps[check_point(family)].flops:
                    self._flops[family.key] = counted
        return self._surfaces[family.key]

    def _trace(self, point: Point) -> tuple[StepShape, Step]:
        if point not in self._traced:
            try:
                step = self._step(point)
                shape = StepShape(step)
            except (NotRepeatingError, NotTracedError):  # some models count their layers, or address them
                if not self._together or not any(built.stacks for built in self._models.values()):
                    raise
                self._together = next(self._cuts)
                self._models.clear()
                return self._trace(point)
            self._traced[point] = shape, step
        return self._traced[point]

    def _step(self, point: Point) -> Step:
        batch_size, seq_len, rank = point
        setting = replace(self.setting, batch_size=batch_size, seq_len=seq_len)
        since = time.monotonic()
        model = self._base if isinstance(self._base, nn.Module) else None
        # The step runs on the meta device, so the values of a live model are out of its reach.
        with Keeper(model, values=False):
            built = self._model(rank)
            what = f"a step of {type(built.transformer).__name__}, batch {batch_size} x {seq_len}, r={rank}"
            with limited(what):
                step = assemble(built, setting)
        require_few(what, step.whole_length())
        self._slowest = max(self._slowest, time.monotonic() - since)
        return step

    def _model(self, rank: int) -> MetaModel:
        if rank not in self._models:
            config = copy.copy(self._config)
            config.r = rank
            with quiet():
                self._models = {rank: build(self._base, config, self.setting, together=self._together)}
        return self._models[rank]


_IN_FLOAT32 = 2
"""Bytes of a number in float32 for each in the smallest dtype of adapters, which are 16 bits."""


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
        moved = _moved_between_gpus(getattr(model, "config", None), setting)
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


def _moved_between_gpus(config: Any, setting: StepSetting) -> int:
    """Bytes of the logits and of hidden states with their gradient in float32, and of a workspace of cuBLAS."""
    text = getattr(config, "text_config", config)
    numbers = (getattr(text, "vocab_size", 0) or 0) + 2 * (getattr(text, "hidden_size", 0) or 0)
    return 4 * numbers * setting.batch_size * setting.seq_len + setting.workspace


def _thresholds(base: Any) -> list[int]:
    """Sequence lengths from which a model attends in another way."""
    config = getattr(base, "config", base)
    found: set[int] = set()
    for part in (config, getattr(config, "text_config", None)):
        values = (getattr(part, name, None) for name in _WINDOWS)
        found |= {value for value in values if isinstance(value, int) and value > 1}
    return sorted(found)
