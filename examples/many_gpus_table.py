"""Which LoRA steps of a 70B fit on 1, 2, 4 and 8 cards of 80 GiB, and what decides; no GPU and no weights.

python examples/many_gpus_table.py [--cards 1 8] [--picture table.svg]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig

from pytest_lora import StepMemory, step_memory

BASE = "meta-llama/Llama-3.1-70B"
BUDGET = 80 * 2**30
RANKS, BATCHES, LENGTHS = (8, 16, 64, 128), (1, 4, 8), (2048, 4096, 8192)
CONFIG = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


class Setup(NamedTuple):
    """How a step is shared, and how its base is stored."""

    cards: int
    strategy: str
    quantization: str | None
    checkpointing: bool

    def __str__(self) -> str:
        shared = f"{self.cards} x {self.strategy}" if self.cards > 1 else "1 card"
        kept = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{shared}, {self.quantization or 'bf16'}, {kept}"


def setups(cards: list[int]) -> Iterator[Setup]:
    """All ways, in the order of the table."""
    for count in cards:
        for strategy in ("ddp", "fsdp", "zero3") if count > 1 else ("ddp",):
            for quantization in (None, "nf4"):
                for checkpointing in (False, True):
                    yield Setup(count, strategy, quantization, checkpointing)


def asked_as(setup: Setup) -> Setup:
    """The way that leaves every card the same: DDP takes as much of each, however many there are."""
    return setup._replace(cards=2) if setup.strategy == "ddp" and setup.cards > 1 else setup


def memory_of(setup: Setup) -> StepMemory:
    """The step of a way to share it at any batch, length and rank."""
    return step_memory(
        CONFIG,
        BASE,
        gpus=setup.cards,
        strategy=setup.strategy,
        quantization=_stored(setup),
        prepare_for_kbit=False,
        gradient_checkpointing=setup.checkpointing,
    )


def _stored(setup: Setup) -> Any:
    if setup.quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="bfloat16",
    )


class Peaks:
    """Peaks of one way to share a step, in bytes, each asked once: what is equal in tokens is equal in memory."""

    def __init__(self, setup: Setup) -> None:
        self._memory = memory_of(setup)
        self._known: dict[tuple[int, int], int] = {}

    def at(self, rank: int, tokens: int) -> int:
        """Bytes on the fullest card."""
        if (rank, tokens) not in self._known:
            batch, length = next((b, n) for b in BATCHES for n in LENGTHS if b * n == tokens)
            self._known[rank, tokens] = self._memory.peak_allocated(batch, length, rank)
        return self._known[rank, tokens]

    def largest_rank(self, tokens: int) -> int:
        """The largest rank whose step fits, 0 for none; ranks between the ends are asked where the ends differ."""
        if self.at(RANKS[-1], tokens) <= BUDGET:
            return RANKS[-1]
        if self.at(RANKS[0], tokens) > BUDGET:
            return 0
        return max(rank for rank in RANKS[:-1] if self.at(rank, tokens) <= BUDGET)

    def fitting(self) -> int:
        """How many of the steps fit."""
        return sum(
            len([rank for rank in RANKS if rank <= self.largest_rank(batch * length)])
            for batch in BATCHES
            for length in LENGTHS
        )

    def what_decides(self) -> tuple[float, float, float]:
        """GiB of the smallest step, and what the largest rank and the most tokens add to it."""
        fewest, most = BATCHES[0] * LENGTHS[0], BATCHES[-1] * LENGTHS[-1]
        least = self.at(RANKS[0], fewest)
        by_rank, by_tokens = self.at(RANKS[-1], fewest) - least, self.at(RANKS[0], most) - least
        return least / 2**30, by_rank / 2**30, by_tokens / 2**30


def row(setup: Setup, found: Peaks) -> str:
    """For each batch and length the largest rank that fits, or a dash."""
    ranks = [found.largest_rank(batch * length) for batch in BATCHES for length in LENGTHS]
    return f"{setup!s:38s} " + " ".join(f"{rank or '-':>6}" for rank in ranks)


def picture(rows: dict[str, Peaks]) -> str:
    """How many of the steps of each way fit, as bars."""
    steps = len(RANKS) * len(BATCHES) * len(LENGTHS)
    height, width, left = 22, 720, 300
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(rows) + 40}" role="img" '
        'font-family="sans-serif" font-size="13">',
        "<title>Steps of a 70B that fit on cards of 80 GiB</title>",
        f'<text x="{left}" y="18" fill="currentColor">of {steps} steps (rank, batch, sequence) fit</text>',
    ]
    for number, (name, found) in enumerate(rows.items()):
        fits = found.fitting()
        top = 30 + number * height
        bar = (width - left - 60) * fits / steps
        lines.append(
            f'<text x="{left - 8}" y="{top + 14}" text-anchor="end" fill="currentColor">{name}</text>'
        )
        lines.append(f'<rect x="{left}" y="{top + 2}" width="{bar:.0f}" height="16" fill="#3b7ddd"/>')
        lines.append(f'<text x="{left + bar + 6:.0f}" y="{top + 14}" fill="currentColor">{fits}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Print the table; with ``--picture`` draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"Largest rank of {RANKS} that fits {BUDGET / 2**30:.0f} GiB a card, {BASE}, all-linear")
    print(
        " " * 38, " ".join(f"{f'{batch}x{length // 1024}k':>6s}" for batch in BATCHES for length in LENGTHS)
    )
    rows: dict[str, Peaks] = {}
    known: dict[Setup, Peaks] = {}
    for setup in setups(asked.cards):
        same = asked_as(setup)
        found = rows[str(setup)] = known[same] if same in known else known.setdefault(same, Peaks(same))
        print(row(setup, found), flush=True)
    print("\nGiB on the fullest card: the smallest step, rank 128 instead of 8, 64k tokens instead of 2k")
    for name, found in rows.items():
        least, by_rank, by_tokens = found.what_decides()
        print(f"{name:38s} {least:6.1f}  {by_rank:+6.1f}  {by_tokens:+7.1f}")
    if asked.picture:
        asked.picture.write_text(picture(rows))


if __name__ == "__main__":
    main()
