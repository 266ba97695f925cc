"""Shapes of a training step: batch, sequence, and what decides how much memory they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from hypothesis import strategies as st

from pytest_lora.facts.memory_choices import STRATEGIES
from pytest_lora.inspection.quiet import unexplained

QUANTIZATIONS = (None, "nf4", "fp4", "int8")
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd")
LONGEST = 8192
LARGEST_BATCH = 64


@dataclass(frozen=True, slots=True, repr=False)
class TrainingShape:
    """How a training step is run; its fields are arguments of ``estimate_memory``.

    Attributes:
        batch_size: Sequences in a micro-batch, at least 1.
        seq_len: Tokens in each.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"``, or None for a base in 16 bits.
        optimizer: As in ``TrainingArguments(optim=...)``.
        gpus: How many share the step.
        strategy: How they do.
    """

    batch_size: int = 1
    seq_len: int = 1
    gradient_checkpointing: bool = False
    quantization: str | None = None
    optimizer: str = OPTIMIZERS[0]
    gpus: int = 1
    strategy: str = STRATEGIES[0]

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        written = {k: v for k, v in given.items() if k in ("batch_size", "seq_len") or v != _default(k)}
        return f"TrainingShape({', '.join(f'{k}={v!r}' for k, v in written.items())})"


def _default(name: str) -> Any:
    return next(f.default for f in fields(TrainingShape) if f.name == name)


def training_shapes(
    *,
    max_batch_size: int = LARGEST_BATCH,
    max_seq_len: int = LONGEST,
    gradient_checkpointing: Iterable[bool] = (False, True),
    quantizations: Iterable[str | None] = QUANTIZATIONS,
    optimizers: Iterable[str] = OPTIMIZERS,
    gpus: Iterable[int] = (1,),
    strategies: Iterable[str] = STRATEGIES[:1],
) -> st.SearchStrategy[TrainingShape]:
    """Draw the shape of a training step.

    A failing example shrinks to batch 1, the shortest sequence, and the first of each of the other lists.

    Args:
        max_batch_size: Largest batch, at least 1.
        max_seq_len: Longest sequence in tokens, at least 1.
        gradient_checkpointing: What to draw from.
        quantizations: What to draw from, of ``"nf4"``, ``"fp4"``, ``"int8"`` and None.
        optimizers: What to draw from, of the names that ``TrainingArguments(optim=...)`` takes and
            ``estimate_memory`` knows.
        gpus: Numbers of GPUs to draw from, each at least 1.
        strategies: What to draw from where there are several, of ``"ddp"``, ``"fsdp2"``, ``"zero3"`` and so on.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A bound is below 1, or a list is empty or holds something unknown.
    """
    from pytest_lora.inspection.memory.optimizers import OPTIMIZERS as KNOWN

    return _shapes(
        _require_bound("max_batch_size", max_batch_size),
        _require_bound("max_seq_len", max_seq_len),
        _one_of("gradient_checkpointing", gradient_checkpointing, (False, True)),
        _one_of("quantizations", quantizations, QUANTIZATIONS),
        _one_of("optimizers", optimizers, tuple(KNOWN)),
        st.sampled_from([_require_bound("gpus", count) for count in _listed("gpus", gpus)]),
        _one_of("strategies", strategies, STRATEGIES),
    )


@st.composite
def _shapes(
    draw: Callable[[st.SearchStrategy[Any]], Any],
    largest_batch: int,
    longest: int,
    checkpointing: st.SearchStrategy[bool],
    quantizations: st.SearchStrategy[str | None],
    optimizers: st.SearchStrategy[str],
    gpus: st.SearchStrategy[int],
    strategies: st.SearchStrategy[str],
) -> TrainingShape:
    """Drawn is the number of tokens, then the batch that they are cut into.

    With batch and sequence drawn apart, a fault of their product would not shrink: a smaller batch needs a
    longer sequence. So a smaller batch has the longer sequence.
    """
    with unexplained():
        tokens = draw(st.integers(1, longest) | st.integers(1, longest * largest_batch))
        batch_size = draw(st.integers(1, largest_batch))
        cards = draw(gpus)
        return TrainingShape(
            batch_size=batch_size,
            seq_len=min(longest, max(1, tokens // batch_size)),
            gradient_checkpointing=draw(checkpointing),
            quantization=draw(quantizations),
            optimizer=draw(optimizers),
            gpus=cards,
            strategy=draw(strategies) if cards > 1 else STRATEGIES[0],
        )


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, not {values!r}")
    wanted = list(values)
    if not wanted:
        raise ValueError(f"{name} must not be empty")
    return wanted


def _one_of(name: str, values: Any, known: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    wanted = _listed(name, values)
    if unknown := [value for value in wanted if value not in known]:
        raise ValueError(f"{name}: {unknown[0]!r} is none of {', '.join(map(str, known))}")
    return st.sampled_from(wanted)


def _require_bound(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return value
