"""What else one could do about a step that does not fit: each change estimated, the smallest first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from pytest_lora.facts.memory import Alternative, MemoryEstimate
from pytest_lora.memory import step_memory

_FEWER_TARGETS = ["q_proj", "v_proj"]
"""Targets of the LoRA paper (arXiv:2106.09685, section 4.2), where PEFT has no default for the model."""


class _Change(NamedTuple):
    """A change: its words, the adapter, the settings that differ, and batch, sequence and rank."""

    text: str
    config: Any
    fields: dict[str, Any]
    batch: int
    length: int
    rank: int


def alternatives(
    base: Any, config: Any, setting: dict[str, Any], estimate: MemoryEstimate, budget: int
) -> tuple[Alternative, ...]:
    """Each single change estimated: those that fit first, the one that changes least before the others.

    Where none fits that keeps the sequence, all of them are tried together; where that does not either,
    with shorter sequences.
    """
    now = _Change("", config, {}, estimate.setting.batch_size, estimate.setting.seq_len, config.r)

    def estimated(changes: Iterable[_Change]) -> list[Alternative]:
        return [Alternative(c.text, _peak(base, setting, c), smaller_rank=c.rank < now.rank) for c in changes]

    def any_fits() -> bool:
        return any(a.peak_allocated <= budget for a in found)

    found = estimated(_single(base, setting, estimate, now))
    fewer_tokens_help = estimate.loaded <= budget
    if fewer_tokens_help:
        found += _until_one_fits(estimated, _smaller_batches(setting, now), budget)
    together = _together(setting, estimate, now)
    if together is not None and not any_fits():
        found += estimated([together])
    if fewer_tokens_help:
        found += _until_one_fits(estimated, _shorter_sequences(setting, now), budget)
    if together is not None and not any_fits():
        found += _until_one_fits(estimated, _shorter_sequences(setting, together), budget)
    return tuple(sorted(found, key=lambda a: (a.peak_allocated > budget, a.smaller_rank)))


def _single(base: Any, setting: dict[str, Any], estimate: MemoryEstimate, now: _Change) -> Iterator[_Change]:
    for text, fields in (*_same_result(setting, estimate), *_other_weights(estimate)):
        yield now._replace(text=text, fields=fields)
    if (targets := _fewer_targets(base, now.config)) is not None:
        fewer = copy.deepcopy(now.config)
        fewer.target_modules = targets
        yield now._replace(text=f"target_modules={sorted(targets)}", config=fewer)
    for rank in dict.fromkeys((now.rank // 2, 1)):
        if 0 < rank < now.rank:
            yield now._replace(text=f"r={rank}", rank=rank)


def _until_one_fits(
    estimated: Callable[[list[_Change]], list[Alternative]], changes: Iterator[_Change], budget: int
) -> list[Alternative]:
    """The first change, and the first that fits if that is another one."""
    found: list[Alternative] = []
    for change in changes:
        (tried,) = estimated([change])
        if tried.peak_allocated <= budget or not found:
            found.append(tried)
        if tried.peak_allocated <= budget:
            break
    return found


def _smaller_batches(setting: dict[str, Any], now: _Change) -> Iterator[_Change]:
    batch = now.batch
    while batch > 1:
        batch //= 2
        accumulation = setting.get("accumulation", 1) * -(-now.batch // batch)
        text = f"batch_size={batch} with accumulation={accumulation}"
        yield now._replace(text=text, batch=batch, fields={**now.fields, "accumulation": accumulation})


def _shorter_sequences(setting: dict[str, Any], now: _Change) -> Iterator[_Change]:
    length = now.length
    while length > 1:
        length //= 2
        text = " with ".join(filter(None, (now.text, f"seq_len={length}")))
        yield now._replace(text=text, length=length)


def _together(setting: dict[str, Any], estimate: MemoryEstimate, now: _Change) -> _Change | None:
    """Everything that keeps the sequence at once: checkpointing, packed weights and states, a batch of one.

    None where that is no more than one change.
    """
    changes = [*_same_result(setting, estimate), *_other_weights(estimate)]
    fields = {name: value for _, changed in changes for name, value in changed.items()}
    words = [text for text, _ in changes]
    if now.batch > 1:
        fields["accumulation"] = setting.get("accumulation", 1) * now.batch
        words.append(f"batch_size=1 with accumulation={fields['accumulation']}")
    return now._replace(text=" with ".join(words), fields=fields, batch=1) if len(words) > 1 else None


def _same_result(setting: dict[str, Any], estimate: MemoryEstimate) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that leave what is learned as it is, or nearly."""
    asked = estimate.setting
    if not asked.gradient_checkpointing:
        yield "gradient_checkpointing=True", {"gradient_checkpointing": True}
    if asked.optimizer.startswith("adamw_torch"):
        yield 'optimizer="adamw_8bit"', {"optimizer": "adamw_8bit"}
    packed = asked.quantization
    if packed is not None and packed.method != "int8" and not packed.double_quant:
        yield "bnb_4bit_use_double_quant=True", {"quantization": replace(packed, double_quant=True)}


def _other_weights(estimate: MemoryEstimate) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of how the base is stored."""
    asked = estimate.setting
    if asked.dtype == "float32":
        yield 'dtype="bfloat16"', {"dtype": "bfloat16"}
    if asked.quantization is None or asked.quantization.method == "int8":
        yield 'quantization="nf4"', {"quantization": "nf4"}


def _peak(base: Any, setting: dict[str, Any], change: _Change) -> int:
    memory = step_memory(base, change.config, **{**setting, **change.fields})
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
