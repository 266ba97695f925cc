"""What the user says is meant: intent and thresholds, each default with its source."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from peft import LoraConfig

_THRESHOLDS = (
    "min_scaling",
    "low_scaling",
    "max_scaling",
    "max_scaling_rslora",
    "max_scaling_spread",
    "max_dropout",
)

Purpose = Literal["train", "eval", "inference"]
Serve = Literal["vllm", "sglang", "lorax", "tgi", "llama.cpp", "mlx", "transformers"]
"""Servers of which it is known what they make of an adapter (``facts/servers.py``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """What is meant by a set-up, where only the user can know it.

    Every field has a default under which a deliberate but unusual choice is not called a fault.

    Attributes:
        config: The ``LoraConfig`` that was meant. What the model has is compared with it: rank, alpha,
            target modules, patterns, rsLoRA, DoRA, dropout.
        alpha_ratio: The effective scaling that every adapted module must have (``alpha / r``, or
            ``alpha / sqrt(r)`` under rsLoRA). ``None`` (default) accepts what the thresholds accept.
        param_ratio: ``(low, high)``, the share of trainable among all logical parameters, as fractions.
            ``None`` (default): only an info, and only where the base is large.
        purpose: What the model is for now: ``"train"`` (default), ``"eval"`` (an evaluation during
            training: adapters trainable, dropout off) or ``"inference"``.
        fresh: ``True``: the adapter was just made and must not change the base yet. ``False``: it has
            been trained or loaded, so zero ``lora_B`` means that nothing was learned or loaded.
            ``None`` (default): either.
        new_tokens: Rows that were added to the vocabulary and have to be trained.
        scope: The part of the model that adapters may touch, as it is called in module names
            (``"language_model"``).
        pretrained_head: The task head was trained elsewhere, so freezing it is meant.
        completion_only: Only the answers are to be learned: the tokens of prompts have the label -100.
        will_merge: The adapter is going to be merged into the base weights.
        reported_percent: The trainable percentage that the user's own code prints.
        serve: The server that the adapter is for: ``"vllm"``, ``"sglang"``, ``"lorax"``, ``"tgi"``, ``"llama.cpp"``,
            ``"mlx"`` or ``"transformers"``. What it refuses or drops is then found (docs/serving.md).
        max_lora_rank: The rank limit that the server is started with. ``None`` (default): its own default, 16 on vLLM.
        read_pickle: Saved adapters: read ``adapter_model.bin`` too, building nothing of it but names and shapes. By
            default it is named, not opened.
        min_scaling: Effective scalings below this damp an adapter. Default 1/50: the smallest scaling in
            use on purpose that we know of is 1/32 (``r=32, alpha=1``, the default of kohya-ss/sd-scripts
            issue 98 and of many diffusion trainers); ``r=64`` with that same alpha is the report there.
        low_scaling: Effective scalings below this are mentioned. Default 1/8, half of QLoRA's 1/4.
        max_scaling: Effective scalings above this blow an adapter up. Default 32: QLoRA
            (arXiv:2305.14314) uses 1/4, LoRA (arXiv:2106.09685) 1 to 8, rank-1 recipes with alpha 32
            reach 32.
        max_scaling_rslora: The same where rsLoRA divides by ``sqrt(r)`` and alpha was still chosen as a
            multiple of the rank. Default 12: rsLoRA (arXiv:2312.03732) keeps alpha fixed while r grows, so that
            its scaling falls with the rank; alpha = 2 r passes 12 at rank 36.
        max_scaling_spread: Largest over smallest effective scaling among the modules of one adapter.
            Default 8: a rank pattern that doubles or quadruples a rank without its alpha is common.
        large_base: Logical parameters from which the band of ``advised_percent`` is advice worth giving.
            Default one billion.
        advised_percent: Trainable percentage usual on a large base. Default 0.01 to 5: LoRA
            (arXiv:2106.09685) reports 0.003 to 0.6 %, QLoRA's all-linear adapters 0.2 to 3 %.
        max_dropout: LoRA dropout above this starves the adapter. Default 0.5; QLoRA (arXiv:2305.14314)
            uses 0.05 to 0.1.
    """

    config: LoraConfig | None = None
    alpha_ratio: float | None = None
    param_ratio: tuple[float, float] | None = None
    purpose: Purpose = "train"
    fresh: bool | None = None
    new_tokens: int | None = None
    scope: str | None = None
    pretrained_head: bool = False
    completion_only: bool = False
    will_merge: bool = False
    reported_percent: float | None = None
    serve: Serve | None = None
    max_lora_rank: int | None = None
    read_pickle: bool = False
    min_scaling: float = field(default=1 / 50)
    low_scaling: float = field(default=1 / 8)
    max_scaling: float = field(default=32.0)
    max_scaling_rslora: float = field(default=12.0)
    max_scaling_spread: float = field(default=8.0)
    large_base: int = field(default=1_000_000_000)
    advised_percent: tuple[float, float] = field(default=(0.01, 5.0))
    max_dropout: float = field(default=0.5)

    def __post_init__(self) -> None:
        if self.purpose not in get_args(Purpose):
            raise ValueError(f"purpose must be one of {', '.join(get_args(Purpose))}, not {self.purpose!r}")
        if self.serve is not None and self.serve not in get_args(Serve):
            raise ValueError(f"serve must be one of {', '.join(get_args(Serve))}, not {self.serve!r}")
        if self.max_lora_rank is not None:
            _require_count("max_lora_rank", self.max_lora_rank)
            if self.max_lora_rank == 0 or self.serve is None:
                raise ValueError(
                    "max_lora_rank must be at least 1"
                    if self.serve
                    else "max_lora_rank is the limit of a server: say which with serve"
                )
        for name in ("fresh", "pretrained_head", "completion_only", "will_merge", "read_pickle"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, not {value!r}")
        for name in ("alpha_ratio", "reported_percent", *_THRESHOLDS):
            _require_number(name, getattr(self, name))
        for name in ("new_tokens", "large_base"):
            _require_count(name, getattr(self, name))
        for name in ("param_ratio", "advised_percent"):
            _require_band(name, getattr(self, name))
        if self.scope is not None and (not isinstance(self.scope, str) or not self.scope):
            raise TypeError(
                f"scope must be a part of module names such as 'language_model', not {self.scope!r}"
            )
        if self.config is not None and not hasattr(self.config, "lora_alpha"):
            raise TypeError(f"config must be a LoraConfig, not {type(self.config).__name__}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(f.name for f in fields(cls))


def _require_number(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")


def _require_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")


def _require_band(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (low, high), not {value!r}")
    for bound in value:
        _require_number(name, bound)
    if value[0] > value[1]:
        raise ValueError(f"{name} must be (low, high) with low <= high, not {value!r}")
