"""What else one could do about a step that does not fit: each change estimated, the smallest first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from pytest_lora.facts.memory import Alternative, MemoryEstimate
from pytest_lora.memory.estimate import step_memory

_MOST_JOINED = 4
"""Changes at once; more are another set-up."""

_FEWER_TARGETS = ["q_proj", "v_proj"]
"""Targets of the LoRA paper (arXiv:2106.09685, section 4.2), where PEFT has no default for the model."""


_Storage = tuple[str, dict[str, Any]]
"""A change of how something is stored: its words, and the settings that differ."""


class _Change(NamedTuple):
    """A change: its words, the adapter, the settings that differ, and batch, sequence and rank."""

    text: str
    config: Any
    fields: dict[str, Any]
    batch: int
    length: int
    rank: int


class _Tried(NamedTuple):
    """A change, and the peak in bytes that it leads to."""

    change: _Change
    peak: int


def alternatives(
    base: Any, config: Any, setting: dict[str, Any], estimate: MemoryEstimate, budget: int
) -> tuple[Alternative, ...]:
    """Each single change estimated: those that fit first, the one that changes least before the others.

    Where none fits that keeps the sequence, two are tried together, then three, then four; where that does not
    either, with shorter sequences.
    """
    now = _Change("", config, {}, estimate.setting.batch_size, estimate.setting.seq_len, config.r)

    def estimated(changes: Iterable[_Change]) -> list[_Tried]:
        rows = []
        for change in changes:
            with suppress(ValueError):  # what cannot be built is no way out: a classifier in 4 bits, for one
                rows.append(_Tried(change, _peak(base, setting, change)))
        return rows

    def any_fits() -> bool:
        return any(tried.peak <= budget for tried in found)

    accumulation = estimate.setting.accumulation
    storage = [*_same_result(estimate), *_other_weights(estimate)]
    found = estimated(_single(base, storage, now))
    together: list[_Tried] = []
    if estimate.loaded <= budget:
        found += _until_one_fits(estimated, _smaller_batches(accumulation, now), budget)
    if not any_fits():
        joined = _together(accumulation, storage, found, estimate.peak_allocated, now)
        for change in joined:
            together = estimated([change]) or together
            if together and together[-1].peak <= budget:
                break
        found += together
    if estimate.has_tokens and estimate.loaded <= budget:
        found += _until_one_fits(estimated, _shorter_sequences(now), budget)
    if estimate.has_tokens and together and not any_fits():
        found += _until_one_fits(estimated, _shorter_sequences(together[0].change), budget)
    rows = [Alternative(t.change.text, t.peak, smaller_rank=t.change.rank < now.rank) for t in found]
    return tuple(sorted(rows, key=lambda a: (a.peak_allocated > budget, a.smaller_rank)))


def _single(base: Any, storage: Iterable[_Storage], now: _Change) -> Iterator[_Change]:
    for text, fields in storage:
        yield now._replace(text=text, fields=fields)
    if (targets := _fewer_targets(base, now.config)) is not None:
        fewer = copy.deepcopy(now.config)
        fewer.target_modules = targets
        yield now._replace(text=f"target_modules={sorted(targets)}", config=fewer)
    for rank in dict.fromkeys((now.rank // 2, 1)):
        if 0 < rank < now.rank:
            yield now._replace(text=f"r={rank}", rank=rank)


def _until_one_fits(
    estimated: Callable[[list[_Change]], list[_Tried]], changes: Iterator[_Change], budget: int
) -> list[_Tried]:
    """The first change, and the first that fits if that is another one."""
    found: list[_Tried] = []
    for change in changes:
        tried = estimated([change])
        fits = any(t.peak <= budget for t in tried)
        if fits or not found:
            found += tried
        if fits:
            break
    return found


def _smaller_batches(now_accumulated: int, now: _Change) -> Iterator[_Change]:
    batch = now.batch
    while batch > 1:
        batch //= 2
        accumulation = now_accumulated * -(-now.batch // batch)
        text = f"batch_size={batch} with accumulation={accumulation}"
        yield now._replace(text=text, batch=batch, fields={**now.fields, "accumulation": accumulation})


def _shorter_sequences(now: _Change) -> Iterator[_Change]:
    length = now.length
    while length > 1:
        length //= 2
        text = " with ".join(filter(None, (now.text, f"seq_len={length}")))
        yield now._replace(text=text, length=length)


def _together(
    accumulation: int, storage: list[_Storage], singly: list[_Tried], peak: int, now: _Change
) -> Iterator[_Change]:
    """Two, three and four changes at once that keep the sequence: those that save most by themselves."""
    alone = {tried.change.text: tried.peak for tried in singly}
    saving = {text: alone[text] for text, _ in storage if alone.get(text, peak) <= peak}
    batches = [tried.peak for tried in singly if tried.change.batch < now.batch]
    whole = f"batch_size=1 with accumulation={accumulation * now.batch}"
    if now.batch > 1:
        saving[whole] = min(batches, default=peak)
    best = sorted(saving, key=lambda text: saving[text])
    for count in range(2, min(len(best), _MOST_JOINED) + 1):
        chosen = [text for text in saving if text in best[:count]]
        fields = {
            name: value for text, changed in storage if text in chosen for name, value in changed.items()
        }
        change = now._replace(text=" with ".join(chosen), fields=fields)
        if whole in chosen:
            fields["accumulation"] = accumulation * now.batch
            change = change._replace(batch=1)
        yield change


def _same_result(estimate: MemoryEstimate) -> Iterator[_Storage]:
    """Changes that leave what is learned as it is, or nearly."""
    asked = estimate.setting
    if not asked.gradient_checkpointing:
        yield "gradient_checkpointing=True", {"gradient_checkpointing": True}
    if asked.optimizer.startswith("adamw_torch"):
        yield 'optimizer="adamw_8bit"', {"optimizer": "adamw_8bit"}
    packed = asked.quantization
    if packed is not None and packed.method != "int8" and not packed.double_quant:
        yield "bnb_4bit_use_double_quant=True", {"quantization": replace(packed, double_quant=True)}


def _other_weights(estimate: MemoryEstimate) -> Iterator[_Storage]:
    """Changes of how the base is stored."""
    asked = estimate.setting
    if asked.dtype == "float32":
        yield 'dtype="bfloat16"', {"dtype": "bfloat16"}
    if asked.quantization is None or asked.quantization.method == "int8":
        yield 'quantization="nf4"', {"quantization": "nf4"}


def _peak(base: Any, setting: dict[str, Any], change: _Change) -> int:
    memory = step_memory(change.config, base, **{**setting, **change.fields})
    return memory.peak_allocated(change.batch, change.length, change.rank)


def _fewer_targets(base: Any, config: Any) -> set[str] | None:
    """PEFT's own choice for this kind of model, where that is less than what is targeted now."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = getattr(getattr(base, "config", base), "model_type", "")
    usual = set(DEFAULTS.get(kind, _FEWER_TARGETS))
    now = config.target_modules
    if now == "all-linear" or (isinstance(now, (set, list, tuple)) and usual < set(now)):
        return usual
    return None
