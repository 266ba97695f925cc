"""What else one could do about a step that does not fit: each change estimated and priced, the simplest first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, get_args

from pytest_lora.facts.memory import MemoryEstimate
from pytest_lora.facts.memory_choices import SHARDED, Alternative, Seen
from pytest_lora.memory.estimate import step_memory

_MOST_JOINED = 4
"""Changes at once; more are another set-up."""

_FEWER_TARGETS = ["q_proj", "v_proj"]
"""Targets of the LoRA paper (arXiv:2106.09685, section 4.2), where PEFT has no default for the model."""

_OF_LANGUAGE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Tasks without a head of their own, so that what is saved in full are embeddings, which can do without."""

_MOST_CARDS = 64
"""GPUs up to which more of them are tried, each time twice as many."""

_SHRINKING = ("fsdp1", "fsdp2", "zero3")
"""Strategies under which every further GPU makes the part of each smaller."""

_Sharing = tuple[str, dict[str, Any]]
"""How the GPUs share a step: its words, and the settings that differ."""


def _other_sharing(estimate: MemoryEstimate) -> Iterator[_Sharing]:
    """Strategies that divide the weights, where the one of the step leaves them whole on every GPU."""
    shared = estimate.setting.parallel
    if shared is None or shared.strategy in SHARDED:
        return
    for strategy, words in (("zero3", "zero3"), ("fsdp2", "fsdp")):
        yield f'strategy="{words}"', _of(shared.gpus, strategy)


def _more_cards(estimate: MemoryEstimate) -> Iterator[_Sharing]:
    """Twice as many GPUs, four times as many and so on, with weights divided among them."""
    shared = estimate.setting.parallel
    if shared is None:
        return
    strategy = shared.strategy if shared.strategy in _SHRINKING else "fsdp2"
    words = "" if strategy == shared.strategy else ' with strategy="fsdp"'
    gpus = 2 * shared.gpus
    while gpus <= _MOST_CARDS:
        yield f"gpus={gpus}{words}", _of(gpus, strategy)
        gpus *= 2


def _of(gpus: int, strategy: str) -> dict[str, Any]:
    return {"gpus": gpus, "strategy": strategy, "parallel": None}


class _Storage(NamedTuple):
    """A change of how something is stored: its words, the settings that differ, and what training sees of it."""

    text: str
    fields: dict[str, Any]
    learner: Seen


class _Change(NamedTuple):
    """A change: its words, the adapter, the settings that differ, batch, sequence and rank, and what training sees."""

    texts: tuple[str, ...]
    config: Any
    fields: dict[str, Any]
    batch: int
    length: int
    rank: int
    learner: Seen = "same batch"


class _Tried(NamedTuple):
    """A change, the peak in bytes that it leads to, and the operations of a step."""

    change: _Change
    peak: int
    flops: int


def alternatives(
    base: Any, config: Any, setting: dict[str, Any], estimate: MemoryEstimate, budget: int
) -> tuple[Alternative, ...]:
    """Each single change estimated: those that fit first, of these what keeps the texts before what shortens them, one
    change before several, and of as many the one of which training sees least.

    Where none fits that keeps the sequence, two are tried together, then three, then four; where that does not
    either, with shorter sequences.
    """
    if setting.get("parallel") is not None:  # what it says beside how a step is shared holds for others too
        asked = estimate.setting
        said = {"gradient_checkpointing": asked.gradient_checkpointing, "autocast": asked.autocast}
        setting = {**setting, **said}
    now = _Change((), config, {}, estimate.setting.batch_size, estimate.setting.seq_len, config.r)

    def estimated(changes: Iterable[_Change]) -> list[_Tried]:
        rows = []
        for change in changes:
            with suppress(ValueError):  # what cannot be built is no way out: a classifier in 4 bits, for one
                rows.append(_tried(base, setting, change))
        return rows

    def any_fits() -> bool:
        return any(tried.peak <= budget for tried in found)

    accumulation = estimate.setting.accumulation
    storage = [*_same_result(estimate), *_other_weights(estimate)]
    storage += [_Storage(text, fields, "same batch") for text, fields in _other_sharing(estimate)]
    found = estimated(_single(base, storage, now))
    together: list[_Tried] = []
    shortened = now
    if estimate.peak_loading <= budget:
        found += _until_one_fits(estimated, _smaller_batches(accumulation, now), budget)
    if not any_fits():
        cards = (now._replace(texts=(text,), fields=fields) for text, fields in _more_cards(estimate))
        found += _until_one_fits(estimated, cards, budget)
    if not any_fits():
        joined = _together(accumulation, storage, found, estimate.peak_allocated, now)
        for change in joined:
            together = estimated([change]) or together
            shortened = change if len(change.texts) < _MOST_JOINED else shortened
            if together and together[-1].peak <= budget:
                break
        found += together
    if estimate.has_tokens and estimate.peak_loading <= budget:
        found += _until_one_fits(estimated, _shorter_sequences(now), budget)
    if estimate.has_tokens and together and not any_fits():
        found += _until_one_fits(estimated, _shorter_sequences(shortened), budget)
    rows = [
        Alternative(t.change.texts, t.peak, t.flops, t.change.learner, smaller_rank=t.change.rank < now.rank)
        for t in found
    ]
    return tuple(sorted(rows, key=lambda row: _order(row, budget)))


_SEEN = get_args(Seen)


def _order(row: Alternative, budget: int) -> tuple[bool, bool, bool, int, int]:
    too_much, shorter = row.peak_allocated > budget, row.learner == "shorter texts"
    return too_much, row.smaller_rank, shorter, len(row.changes), _SEEN.index(row.learner)


def _single(base: Any, storage: Iterable[_Storage], now: _Change) -> Iterator[_Change]:
    for stored in storage:
        yield now._replace(texts=(stored.text,), fields=stored.fields, learner=stored.learner)
    if (targets := _fewer_targets(base, now.config)) is not None:
        fewer = copy.deepcopy(now.config)
        fewer.target_modules = targets
        yield now._replace(
            texts=(f"target_modules={sorted(targets)}",), config=fewer, learner="fewer weights"
        )
    if now.config.modules_to_save and now.config.task_type in _OF_LANGUAGE:
        adapters = copy.deepcopy(now.config)
        adapters.modules_to_save = None
        yield now._replace(texts=("modules_to_save=None",), config=adapters, learner="fewer weights")
    for rank in dict.fromkeys((now.rank // 2, 1)):
        if 0 < rank < now.rank:
            yield now._replace(texts=(f"r={rank}",), rank=rank, learner="fewer weights")


def _until_one_fits(
    estimated: Callable[[Iterable[_Change]], list[_Tried]], changes: Iterator[_Change], budget: int
) -> list[_Tried]:
    """The first change, and the first that fits if that is another one; each takes less than the one before it.

    Where the last is too much, so are all before it. Where it cannot be estimated, as a sequence that is too short for
    the model, they are tried in turn.
    """

    def fits(tried: list[_Tried]) -> bool:
        return any(one.peak <= budget for one in tried)

    found, others = estimated(islice(changes, 1)), [*changes]
    if fits(found) or not others:
        return found
    last = estimated(others[-1:])
    if found and last and not fits(last):
        return found
    for change in others[:-1]:
        tried = estimated([change])
        if fits(tried) or not found:
            found += tried
        if fits(tried):
            return found
    return found + last if fits(last) or not found else found


def _smaller_batches(now_accumulated: int, now: _Change) -> Iterator[_Change]:
    batch = now.batch
    while batch > 1:
        batch //= 2
        accumulation = now_accumulated * -(-now.batch // batch)
        text = f"batch_size={batch} with accumulation={accumulation}"
        yield now._replace(texts=(text,), batch=batch, fields={**now.fields, "accumulation": accumulation})


def _shorter_sequences(now: _Change) -> Iterator[_Change]:
    length = now.length
    while length > 1:
        length //= 2
        yield now._replace(texts=(*now.texts, f"seq_len={length}"), length=length, learner="shorter texts")


def _together(
    accumulation: int, storage: list[_Storage], singly: list[_Tried], peak: int, now: _Change
) -> Iterator[_Change]:
    """Two, three and four changes at once that keep the sequence: those that save most by themselves."""
    alone = {tried.change.texts[0]: tried.peak for tried in singly}
    saving = {one.text: alone[one.text] for one in storage if alone.get(one.text, peak) <= peak}
    batches = [tried.peak for tried in singly if tried.change.batch < now.batch]
    whole = f"batch_size=1 with accumulation={accumulation * now.batch}"
    if now.batch > 1:
        saving[whole] = min(batches, default=peak)
    fields_of = {one.text: one.fields for one in storage}
    best: list[str] = []
    for text in sorted(
        saving, key=lambda text: saving[text]
    ):  # of two for the same field the one that saves more
        if not any(fields_of.get(text, {}).keys() & fields_of.get(other, {}).keys() for other in best):
            best.append(text)
    for count in range(2, min(len(best), _MOST_JOINED) + 1):
        chosen = tuple(text for text in saving if text in best[:count])
        joined = [one for one in storage if one.text in chosen]
        fields = {name: value for one in joined for name, value in one.fields.items()}
        seen: Seen = max((one.learner for one in joined), key=_SEEN.index, default="same batch")
        change = now._replace(texts=chosen, fields=fields, learner=seen)
        if whole in chosen:
            fields["accumulation"] = accumulation * now.batch
            change = change._replace(batch=1)
        yield change


_ROUNDED: Seen = "same batch, rounded"


def _same_result(estimate: MemoryEstimate) -> Iterator[_Storage]:
    """Changes that leave what is learned as it is, or nearly."""
    asked = estimate.setting
    if not asked.gradient_checkpointing:
        yield _Storage("gradient_checkpointing=True", {"gradient_checkpointing": True}, "same batch")
    if asked.optimizer.startswith("adamw_torch"):
        yield _Storage('optimizer="adamw_8bit"', {"optimizer": "adamw_8bit"}, _ROUNDED)
    if (evaluation := asked.evaluation) is not None and evaluation.batch_size > 1:
        fewer = {"evaluation": replace(evaluation, batch_size=1)}
        yield _Storage("evaluation=Evaluation(batch_size=1)", fewer, "same batch")
    packed = asked.quantization
    if packed is not None and packed.method != "int8" and not packed.double_quant:
        double = {"quantization": replace(packed, double_quant=True)}
        yield _Storage("bnb_4bit_use_double_quant=True", double, _ROUNDED)


def _other_weights(estimate: MemoryEstimate) -> Iterator[_Storage]:
    """Changes of how the base is stored."""
    asked = estimate.setting
    if asked.dtype == "float32":
        yield _Storage('dtype="bfloat16"', {"dtype": "bfloat16"}, _ROUNDED)
    if asked.quantization is None or asked.quantization.method == "int8":
        yield _Storage('quantization="nf4"', {"quantization": "nf4"}, _ROUNDED)


def _tried(base: Any, setting: dict[str, Any], change: _Change) -> _Tried:
    memory = step_memory(change.config, base, **{**setting, **change.fields})
    point = (change.batch, change.length, change.rank)
    return _Tried(change, memory.most_allocated(*point), memory.flops(*point).total)


def _fewer_targets(base: Any, config: Any) -> set[str] | None:
    """PEFT's own choice for this kind of model, where that is less than what is targeted now."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = getattr(getattr(base, "config", base), "model_type", "")
    usual = set(DEFAULTS.get(kind, _FEWER_TARGETS))
    now = config.target_modules
    if now == "all-linear" or (isinstance(now, (set, list, tuple)) and usual < set(now)):
        return usual
    return None
