"""What a server can make of an adapter that PEFT saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Feature = Literal[
    "dora",
    "bias",
    "lora_bias",
    "saved_modules",
    "task_head",
    "whole_embeddings",
    "token_rows",
    "rslora",
    "rank_pattern",
    "alpha_pattern",
    "ranks_by_layer",
    "padded_rank",
    "target_pattern",
    "embedding",
    "head",
    "tied_head",
    "experts",
    "convolution",
    "vision",
    "layers_in_part",
    "attention_in_part",
    "unconverted_init",
    "alora",
    "structure",
    "no_prefix",
    "adapter_in_keys",
    "pickle",
    "target",
]
"""What an adapter can have that not every server knows."""

Outcome = Literal["refuses", "drops", "rescales"]
"""It raises, it goes on without that part, or it multiplies the product by another scaling than PEFT."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What one server does with one feature.

    Attributes:
        outcome: What comes of it.
        reason: What its source does.
        warns: Whether another way of loading on the same server is right, so that this is only a warning.
    """

    outcome: Outcome
    reason: str
    warns: bool = False


@dataclass(frozen=True, slots=True)
class Server:
    """One server.

    Attributes:
        title: What it calls itself.
        version: The version whose source was read.
        source: The files that say so, relative to the repository.
        repository: ``owner/name`` on GitHub.
        features: What it does with the features that it does not serve as PEFT does.
        ranks: Values that its rank limit can take; empty where any will do.
        default_rank: The limit where nobody sets one; None where there is none.
        rank_option: How the limit is set; empty where there is none.
        targets: Last parts of the names of modules that it has LoRA layers for; empty where all linear ones do.
        own_format: Whether it reads a format of its own instead of PEFT's.
    """

    title: str
    version: str
    source: str
    repository: str
    features: dict[Feature, Treatment] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    default_rank: int | None = None
    rank_option: str = ""
    targets: frozenset[str] = frozenset()
    own_format: bool = False

    @property
    def name(self) -> str:
        """Title and version."""
        return f"{self.title} {self.version}"
