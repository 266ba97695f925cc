"""Parameters counted as numbers, not as bytes of packed storage; and what each rank would cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import refusing
from pytest_lora.facts.numbers import markdown_lines, text_lines
from pytest_lora.values import require_items, require_number, require_whole, shown

if TYPE_CHECKING:
    import os

    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig

    from pytest_lora.inspection.parameters import AdapterSize

MEGABYTE = 10**6

MOST_RANK = 2**20
"""Above the sides of all matrices that there are; what is larger leaves the 64 bits of a size."""


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many parameters a model has; tied ones count once.

    Attributes:
        trainable: Logical parameters that require gradients.
        adapter: Logical parameters of all adapters, trainable or not: low-rank factors, magnitude vectors,
            copies of ``modules_to_save``, token rows.
        base: Logical parameters of everything else.
        total: ``base + adapter``.
        stored: What ``sum(p.numel() for p in model.parameters())`` gives. Where 4-bit weights are packed,
            it is smaller than ``total``.
        stored_bytes: Bytes of the parameters as they are stored, without quantization constants.
    """

    trainable: int
    adapter: int
    base: int
    total: int
    stored: int
    stored_bytes: int

    @property
    def percent(self) -> float:
        """``100 * trainable / total``; 0 for a model without parameters."""
        return _percent(self.trainable, self.total)

    @property
    def stored_percent(self) -> float:
        """``100 * trainable / stored``: what a tool prints that takes packed weights for numbers."""
        return _percent(self.trainable, self.stored)

    @property
    def packed(self) -> bool:
        """Whether storage holds fewer numbers than there are parameters."""
        return self.stored < self.total

    def __str__(self) -> str:
        line = (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {self.percent:.4f}"
        )
        if self.packed:
            line += (
                f"\n4-bit weights are packed: sum(p.numel()) sees {self.stored:,} stored numbers, "
                f"so that other tools print {self.stored_percent:.4f}"
            )
        return line


@refusing
def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, with and without adapters, whatever they are stored in.

    4-bit weights are packed two to a byte, and ``quant_storage`` may pack up to eight into one number.
    Counted is what they stand for; on the meta device, where nothing is packed, the same comes out.

    Args:
        model: Any module: a plain model, one with adapters, and these inside DDP, ``torch.compile`` or a
            value head. It is only looked at.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    from pytest_lora.inspection.base import base_parameters
    from pytest_lora.inspection.parameters import count
    from pytest_lora.inspection.survey import survey

    found = survey(model)
    totals = count(model, found, base_parameters(found))
    return ParameterCount(
        trainable=totals.trainable,
        adapter=totals.adapter,
        base=totals.base,
        total=totals.total,
        stored=totals.stored,
        stored_bytes=totals.stored_bytes,
    )


@dataclass(frozen=True, slots=True)
class RankRow:
    """What one rank costs.

    Attributes:
        rank: ``r``.
        alpha: ``lora_alpha``.
        trainable: Parameters that train.
        total: Logical parameters of the base.
        percent: ``100 * trainable / total``.
        adapter_bytes: Bytes of the tensors that ``save_pretrained`` writes.
        stored_percent: What counting stored numbers prints on the 4-bit model: the linear layers of the
            base at half their size, the adapter included in the whole.
    """

    rank: int
    alpha: float
    trainable: int
    total: int
    percent: float
    adapter_bytes: int
    stored_percent: float


@dataclass(frozen=True, slots=True)
class RankTable:
    """What each rank costs on one base, in the order that was asked for.

    Attributes:
        base: Class of the base model.
        total: Logical parameters of the base.
        adapter_dtype: Dtype of the saved adapter (``"float32"``).
        rows: One row a rank.
    """

    base: str
    total: int
    adapter_dtype: str
    rows: tuple[RankRow, ...]

    def __str__(self) -> str:
        return "\n".join(
            (f"LoRA on {self.base}, {self.total:,} parameters", *text_lines(self._cells()), self._notes())
        )

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return "\n".join((*markdown_lines(self._cells()), "", self._notes()))

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("rank", "alpha", "trainable", "trainable %", "adapter MB", "% by packed storage")
        return [
            head,
            *(
                (
                    str(row.rank),
                    f"{row.alpha:g}",
                    f"{row.trainable:,}",
                    _shown(row.percent),
                    f"{row.adapter_bytes / MEGABYTE:,.2f}",
                    _shown(row.stored_percent),
                )
                for row in self.rows
            ),
        ]

    def _notes(self) -> str:
        return (
            f"MB = 10^6 bytes, {self.adapter_dtype}. "
            "By packed storage: what numel() makes of the 4-bit model, where one byte holds two weights."
        )


def rank_table(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    ranks: Iterable[int],
    *,
    alpha_ratio: float = 2.0,
    adapter_dtype: str | torch.dtype = "float32",
    **lora_kwargs: Any,
) -> RankTable:
    """What a LoRA of each rank costs on a base, before any weight is loaded.

    PEFT itself puts the adapter on the base's structure on the meta device, so that patterns, biases, DoRA
    and saved modules count as they will.

    Args:
        base: A live model without adapter, a ``PretrainedConfig``, or the path of a model folder or
            ``config.json``.
        ranks: The ranks, such as ``[4, 8, 16]``.
        alpha_ratio: ``lora_alpha`` of each row is this times its rank, unless ``lora_kwargs`` has a
            ``lora_alpha``.
        adapter_dtype: Dtype that the adapter is saved in. PEFT keeps adapters in float32 unless
            ``autocast_adapter_dtype=False``.
        lora_kwargs: Fields of ``LoraConfig`` (``target_modules=["q_proj", "v_proj"]``), all but ``r``.

    Raises:
        TypeError: An argument has the wrong type, or ``LoraConfig`` has no such field.
        ValueError: There are no ranks or one is below 1, the base cannot be built or carries an adapter
            already, or PEFT refuses the configuration (the message has its reason).
    """
    wanted = _require_ranks(ranks)
    ratio = require_number("alpha_ratio", alpha_ratio, above=0.0, most=1e9)
    dtype_name, itemsize = _require_dtype(adapter_dtype)
    config = _lora_config(lora_kwargs)

    from pytest_lora.inspection.base import base_facts, base_parameters
    from pytest_lora.inspection.parameters import adapter_sizes, stored_in_4bit
    from pytest_lora.inspection.skeleton import require_no_adapter, resolve_base
    from pytest_lora.inspection.survey import survey

    model = resolve_base(base, getattr(config.task_type, "value", config.task_type))
    found = survey(model)
    require_no_adapter(model)
    parameters = base_parameters(found)
    facts = base_facts(found, parameters)
    stored = stored_in_4bit(facts, parameters)
    sizes = adapter_sizes(config, model, set(wanted))

    def row(rank: int, size: AdapterSize) -> RankRow:
        return RankRow(
            rank=rank,
            alpha=lora_kwargs.get("lora_alpha", ratio * rank),
            trainable=size.trainable,
            total=facts.parameters,
            percent=_percent(size.trainable, facts.parameters),
            adapter_bytes=size.saved * itemsize,
            stored_percent=_percent(size.trainable, stored + size.added),
        )

    rows = tuple(row(rank, sizes[rank]) for rank in wanted)
    return RankTable(facts.architecture, facts.parameters, dtype_name, rows)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _shown(percent: float) -> str:
    """Three decimals; more where these would hide the number."""
    return f"{percent:.3f}" if percent >= 0.01 or not percent else f"{percent:.2g}"


def _require_ranks(ranks: Any) -> Sequence[int]:
    wanted = require_items("ranks", ranks, "whole numbers such as [4, 8, 16]")
    if not wanted:
        raise ValueError("ranks must not be empty")
    for rank in wanted:
        require_whole("ranks", rank, least=1, most=MOST_RANK)
    return wanted


def _require_dtype(dtype: Any) -> tuple[str, int]:
    import torch

    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype):
        error = ValueError if isinstance(dtype, str) else TypeError
        raise error(
            f"adapter_dtype must be a torch dtype such as 'float32' or 'bfloat16', not {shown(dtype)}"
        )
    if not known.is_floating_point:
        raise ValueError(f"adapter_dtype must be a floating-point dtype, not {shown(dtype)}")
    return str(known).removeprefix("torch."), known.itemsize


def _lora_config(lora_kwargs: dict[str, Any]) -> LoraConfig:
    from peft import LoraConfig

    if "r" in lora_kwargs:
        raise TypeError("lora_kwargs: r is what ranks is for; leave it out")
    try:
        return LoraConfig(**lora_kwargs)
    except TypeError as error:
        raise TypeError(f"lora_kwargs: {error}") from error
    except ValueError as error:
        raise ValueError(f"lora_kwargs: PEFT refuses them: {error}") from error
