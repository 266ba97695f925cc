"""Memory of the steps of one base and adapter, at any batch size, sequence length and rank."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from pytest_lora.facts.memory import MemoryEstimate, StepSetting
from pytest_lora.facts.operations import StepFlops
from pytest_lora.inspection.memory.batches import has_tokens
from pytest_lora.inspection.memory.cuda_allocator import (
    CUDA_CONTEXT,
    communication_of,
    fastest_replay,
    plainly_replayed,
)
from pytest_lora.inspection.memory.cut_bases import KeptBases
from pytest_lora.inspection.memory.dry_run import NotTracedError
from pytest_lora.inspection.memory.estimate import StepShape
from pytest_lora.inspection.memory.fused_layers import FORMULAS as LAYER_FORMULAS
from pytest_lora.inspection.memory.fused_losses import FORMULAS as LOSS_FORMULAS
from pytest_lora.inspection.memory.layer_stacks import USUAL, Cut
from pytest_lora.inspection.memory.learning import numbers_of, runs_alike, shares_of, thresholds_of
from pytest_lora.inspection.memory.meta_model import MetaModel, build
from pytest_lora.inspection.memory.parallel import cuts_of
from pytest_lora.inspection.memory.patience import Wait, limited, require_few
from pytest_lora.inspection.memory.sizes import Family, Point
from pytest_lora.inspection.memory.step import Recorded, Step, assemble, record
from pytest_lora.inspection.memory.storage_tracker import quiet
from pytest_lora.inspection.memory.surfaces import Answer, Recordings, Surfaces, Traced, answer_of
from pytest_lora.inspection.memory.timeline import NotRepeatingError
from pytest_lora.inspection.memory.unmodelled import of_adapter, of_setting
from pytest_lora.inspection.quiet import collector, unexplained
from pytest_lora.inspection.state import Keeper

if TYPE_CHECKING:
    from peft import LoraConfig

WORTH_FITTING = 3.0
"""Seconds of the processor for a trace up to which further ones for a surface are worth the wait."""

LONG = 200_000
"""Events from which the compiled replay of the allocator is worth loading at once."""

WORTH_LEARNING_AT_ONCE = 1.0
"""Seconds of the processor for a trace of a shared step up to which its families are learned with the first answer:
that takes about five more, and every answer after it none."""

COMPILE_AFTER = 8
"""Replays of the allocator in Python before a compiled one is used, which takes as long to load as about eight
of a 7B."""

KEPT_MODELS = 3
"""Ranks whose model is kept: what is learned of a family takes as many."""

Made = TypeVar("Made")

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
        self._recordings = self._no_recordings() if runs_alike(setting) else None
        self._learns_ahead = setting.parallel is not None and setting.loss == "full"
        self._asked: Point | None = None
        self._quickest = float("inf")  # the first trace imports what it needs
        self._cuts = iter(_CUTS if setting.parallel is None else cuts_of(setting.parallel))
        self._cut = next(self._cuts)

    def _family(self, point: Point) -> Family:
        return Family(point, self._thresholds, self._shares)

    def _no_recordings(self) -> Recordings:
        return Recordings(lambda point: Family(point, self._thresholds), self._record, numbers_of(self._base))

    @unexplained()
    def peak_allocated(self, batch_size: int, seq_len: int, rank: int) -> int:
        """Bytes that ``torch.cuda.max_memory_allocated`` would give."""
        found = self._at((batch_size, seq_len, rank))
        return found.shape.peak_allocated(found.sizes)

    @unexplained()
    def most_allocated(self, batch_size: int, seq_len: int, rank: int) -> int:
        """Bytes allocated at most, while the model is loaded and in a step."""
        found = self._at((batch_size, seq_len, rank))
        return max(found.shape.peak_allocated(found.sizes), found.shape.while_loading(found.sizes))

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
    def estimate(self, batch_size: int, seq_len: int, rank: int, *, ahead: bool = True) -> MemoryEstimate:
        """Everything about one step; ``ahead`` of others, which are learned about with the first of them."""
        point = (batch_size, seq_len, rank)
        found = self._at(point)
        if ahead:
            self._learn_ahead(point)
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
                *of_adapter(self._config),
                *of_setting(
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
                if self._recordings is not None:
                    self._recordings.learn(point)
                self._surfaces.learn(point)
            found: Answer | None = self._surfaces(point)
            if found is not None and point not in self._traced:
                return found
        return answer_of(self._trace(point))

    def _learn_ahead(self, point: Point) -> None:
        """Learn the families of a shared step with the first estimate, as each trace of one is long."""
        wanted, self._learns_ahead = self._learns_ahead, False
        if wanted and point in self._traced and self._quickest < WORTH_LEARNING_AT_ONCE:
            with suppress(NotRepeatingError, ValueError):  # who asks for such a step is told
                if self._recordings is not None:
                    self._recordings.learn_ahead(point)
                self._surfaces.learn_ahead(point)

    def _trace(self, point: Point) -> Traced:
        if point not in self._traced:
            try:
                step = self._step(point)
                known = next(
                    (known for known in self._traced.values() if known.shares_its_shape_with(step)), None
                )
                traced = Traced(StepShape(step) if known is None else known.shape, step)
            except (NotRepeatingError, NotTracedError):  # some models count their layers, or address them
                if not self._cut.together or not any(built.stacks for built in self._models.values()):
                    raise
                self._cut = next(self._cuts)
                self._models.clear()
                self._recordings = self._recordings and self._no_recordings()
                return self._trace(point)
            self._traced[point] = traced
        return self._traced[point]

    def _step(self, point: Point) -> Step:
        recorded = None if self._recordings is None else self._recordings.at(point)
        with self._at_work(point) as (built, setting, wait):
            step = self._timed(lambda: assemble(built, setting, recorded))
        require_few(wait.what, step.whole_length())
        return step

    def _record(self, point: Point) -> Recorded:
        with self._at_work(point) as (built, setting, _):
            return self._timed(lambda: record(built, setting))

    def _timed(self, work: Callable[[], Made]) -> Made:
        since = time.thread_time()  # on a busy machine a trace is not longer, it only waits
        made = work()
        self._quickest = min(self._quickest, time.thread_time() - since)
        return made

    @contextmanager
    def _at_work(self, point: Point) -> Iterator[tuple[MetaModel, StepSetting, Wait]]:
        """The model of a point, its setting, and how long it may take, while its step is run."""
        batch_size, seq_len, rank = point
        model = self._base if isinstance(self._base, nn.Module) else None
        # The step runs on the meta device, so the values of a live model are out of its reach.
        with Keeper(model, values=False), collector.paused():
            asked = self._asked or point
            kind = type(getattr(self._base, "config", self._base)).__name__
            with limited(_in_words(kind, asked, point)) as wait:
                built = self._model(rank)
                wait.what = _in_words(type(built.transformer).__name__, asked, point)
                yield built, replace(self.setting, batch_size=batch_size, seq_len=seq_len), wait

    def _model(self, rank: int) -> MetaModel:
        if rank not in self._models:
            config = copy.copy(self._config)
            config.r = rank
            with quiet():
                built = build(self._base, config, self.setting, cut=self._cut, kept=self._kept)
            self._models = dict([*self._models.items()][1 - KEPT_MODELS :]) | {rank: built}
        return self._models[rank]


def _in_words(architecture: str, asked: Point, traced: Point) -> str:
    """The step that was asked for, and the one that is traced where it is another."""
    step = f"a step of {architecture}, batch {asked[0]} x {asked[1]}, r={asked[2]}"
    if traced == asked:
        return step
    return f"{step} (from how it grows, seen at batch {traced[0]} x {traced[1]}, r={traced[2]})"
