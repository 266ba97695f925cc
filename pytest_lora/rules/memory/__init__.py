"""Rules on the predicted memory of a training step (codes 5xx); and in words: the step, what fills it, what would
help."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_lora.changes import Advice, Change, advise, advise_any, noun
from pytest_lora.facts.memory import MemoryEstimate, MemoryFacts, StepSetting
from pytest_lora.facts.memory_choices import SHARDED
from pytest_lora.facts.numbers import format_bytes

_KBIT = "prepare_model_for_kbit_training"
_INDENT = "\n            "
_NAMED = 3
_IN_4_BITS = Change({"quantization": "nf4"}, 'quantization="nf4"', is_noun=True)
_FROZEN = ("base weights", "quantized base weights", "quantization statistics", "embeddings and head")


def step_in_words(estimate: MemoryEstimate) -> str:
    """``"a step of LlamaForCausalLM, batch 4 x 2048 tokens, r=16, nf4, bfloat16, checkpointing off"``."""
    asked = estimate.setting
    stored = asked.dtype
    if asked.quantization is not None:
        double = " with double quantization" if asked.quantization.double_quant else ""
        rest = f"float32 by {_KBIT}" if asked.prepare_for_kbit else asked.dtype
        stored = f"{asked.quantization.method}{double}, else {rest}"
    if asked.upcast:
        stored += f", {' and '.join(asked.upcast)} in float32"
    shared = f", the fullest of {asked.parallel}" if asked.parallel else ""
    return (
        f"a step of {estimate.architecture}{shared}, {estimate.batch}, r={estimate.rank}, "
        f"base in {stored}, gradient checkpointing {'on' if asked.gradient_checkpointing else 'off'}"
    )


def may_need_more(estimate: MemoryEstimate) -> bool:
    """Whether parts are left out that need memory."""
    return estimate.bound in ("at least", "about")


def surely_fits(estimate: MemoryEstimate, budget: int) -> bool:
    """Whether the step fits with all that is left out, as far as that is known."""
    left_out = [part.most for part in estimate.unmodelled if part.bound == "at least"]
    known = [most for most in left_out if most is not None]
    return len(known) == len(left_out) and estimate.peak_allocated + sum(known) <= budget


def may_need_less(estimate: MemoryEstimate) -> bool:
    """Whether parts are left out that save memory."""
    return estimate.bound in ("at most", "about")


def largest_parts(estimate: MemoryEstimate, categories: Iterable[str] | None = None) -> str:
    """``"activations 12.1 GiB, logits and loss 3.2 GiB"``, the largest first."""
    chosen = estimate.breakdown if categories is None else categories
    parts = [(name, estimate.breakdown[name]) for name in chosen if name in estimate.breakdown]
    largest = sorted(parts, key=lambda part: -part[1])[:_NAMED]
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)


def in_float32(estimate: MemoryEstimate) -> str:
    """Why a quantized base may need more than one in 16 bits, where that is so; else empty.

    PEFT's ``prepare_model_for_kbit_training`` casts every parameter of 16 bits that is not packed to float32
    (``peft.utils.other``), and the hidden states follow the embeddings.
    """
    if not estimate.setting.prepare_for_kbit or estimate.setting.dtype == "float32":
        return ""
    return f"; {_KBIT} casts embeddings, norms and head to float32, and hidden states and logits follow them"


def advice(facts: MemoryFacts) -> Advice:
    """The smallest change that fits, what else was tried, and whether the rank matters."""
    if not facts.alternatives:
        return _untried(facts.estimate.setting, weights_fit=facts.estimate.loaded <= facts.budget)
    fitting = [a for a in facts.alternatives if a.peak_allocated <= facts.budget]
    first = (
        f"{fitting[0].change}: {format_bytes(fitting[0].peak_allocated)}"
        if fitting
        else "none of the changes tried is enough; take a larger GPU, a smaller base, or several GPUs"
    )
    return Advice(_INDENT.join((first, *_rank_words(facts), "what if:", *_rows(facts))))


def _untried(setting: StepSetting, *, weights_fit: bool) -> Advice:
    """What could help, where no change was tried; no smaller step makes room for weights that do not fit."""
    whole = setting.parallel is not None and setting.parallel.strategy not in SHARDED
    step = [
        *(["a smaller batch_size"] if setting.batch_size > 1 else []),
        "a shorter seq_len",
        *([] if setting.gradient_checkpointing else [noun(gradient_checkpointing=True)]),
    ]
    weights = ["a strategy that divides the weights, as ZeRO-3 and FSDP do,"] if whole else ["a smaller base"]
    ways = [*(step if weights_fit else weights), *([] if setting.quantization else [_IN_4_BITS])]
    named = advise_any((advise_any(ways[:-1], ", "), ways[-1]) if len(ways) > 1 else ways)
    return advise("take ", named, "; check_memory with advise=True says how much each one saves")


def shorter(setting: StepSetting) -> Change:
    """A sequence of half the length."""
    return noun(seq_len=max(1, setting.seq_len // 2))


def _rank_words(facts: MemoryFacts) -> list[str]:
    ranks = [a for a in facts.alternatives if a.smaller_rank]
    if not ranks or any(a.peak_allocated <= facts.budget for a in ranks):
        return []
    least = min(ranks, key=lambda a: a.peak_allocated)
    saved = format_bytes(facts.estimate.peak_allocated - least.peak_allocated)
    return [f"lowering the rank will not help: {least.change} saves {saved}"]


_WIDTH = 35
"""Columns of a change, so that a row with its indentation fits 100; a longer one takes several lines."""
_HEAD = ("change", "peak", "FLOPs", "training sees", "")


def _rows(facts: MemoryFacts) -> list[str]:
    """A line a change, or several where it is long; the figures stand in the last of them."""
    cells: list[tuple[str, ...]] = [_HEAD]
    for row in facts.alternatives:
        *lines, last = _lines(row.changes)
        cells += [(line,) for line in lines]
        fits = "fits" if row.peak_allocated <= facts.budget else "too much"
        operations = against_now(row.flops, facts.estimate.flops.total)
        cells.append((last, format_bytes(row.peak_allocated), operations, row.learner, fits))
    whole = [cell for cell in cells if len(cell) == len(_HEAD)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return ["  " + _row(cell, widths) for cell in cells]


def _row(cell: tuple[str, ...], widths: list[int]) -> str:
    if len(cell) < len(widths):
        return cell[0]
    change, peak, operations, seen, fits = cell
    figures = f"{peak:>{widths[1]}}  {operations:>{widths[2]}}  {seen:<{widths[3]}}  {fits}"
    return f"{change:<{widths[0]}}  {figures}".rstrip()


def _lines(changes: tuple[str, ...]) -> list[str]:
    """Changes joined by "with", as many to a line as there is place for; the figures need place beside the last."""
    lines: list[str] = []
    for change in changes:
        joined = f"{lines[-1]} with {change}" if lines else change
        if lines and len(joined) <= _WIDTH:
            lines[-1] = joined
        else:
            if lines:
                lines[-1] += " with"
            lines.append(change)
    return lines if len(lines[-1]) <= _WIDTH else [*lines, ""]


def against_now(flops: int, now: int) -> str:
    """A share of operations as it differs from now: ``"+33 %"``, ``"-0.8 %"``, ``"same"``."""
    percent = 100 * (flops / now - 1) if now else 0.0
    if abs(percent) < 0.05:
        return "same"
    return f"{percent:+.0f} %" if abs(percent) >= 9.95 else f"{percent:+.1f} %"


def left_whole(estimate: MemoryEstimate) -> str:
    """``"; zero2 does not divide the weights ..."`` where several GPUs hold all of them each; else empty."""
    shared = estimate.setting.parallel
    if shared is None or shared.strategy in SHARDED:
        return ""
    kept = sum(estimate.breakdown.get(name, 0) for name in _FROZEN)
    return f"; {shared.strategy} does not divide the weights: {format_bytes(kept)} of them stay on every card"


def beside_in_words(estimate: MemoryEstimate) -> str:
    """``"a CUDA context of about 512.0 MiB"``, and NCCL with several GPUs."""
    what = "a CUDA context and NCCL's buffers" if estimate.communication else "a CUDA context"
    return f"{what} of about {format_bytes(estimate.beside_torch)}"
