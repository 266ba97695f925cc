"""What a recipe makes a run do, as a card shows it: plain numbers and strings only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pytest_lora.facts.recipe import RecipeFacts, RunSetting, Value


OWN_LOSS_NOT_RUN = (
    "{tool}'s own loss, which holds fewer logits, was not run (pip install trl where it is missing)"
)
"""Why the peak of a recipe is an upper bound."""


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One value of the effective setting: its name, what the run has, where that is from; and what was asked for,
    where that is something else, and why."""

    name: str
    value: str
    source: str
    asked: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class RecipeCard:
    """A recipe.

    Attributes:
        title: Name of the file.
        tool: The tool that it is for.
        rows: The effective setting.
        steps: What a step is made of and how many there are, as pairs of words and numbers in words.
        peak: Predicted memory of a step on one card in bytes; None where it is not judged.
        budget: What a card has in bytes; None where none is given.
        gpus: How many cards take part.
        fits: Whether a step fits a card; None where that cannot be told.
        note: What is to be known of the peak; empty where it is that of a whole step.
    """

    kind: ClassVar[str] = "recipe"

    title: str
    tool: str
    rows: tuple[SettingRow, ...]
    steps: tuple[tuple[str, str], ...]
    peak: int | None = None
    budget: int | None = None
    gpus: int = 1
    fits: bool | None = None
    note: str = ""


def recipe_card(
    facts: RecipeFacts,
    gpus: int = 1,
    peak: int | None = None,
    budget: int | None = None,
    *,
    may_fit: bool = False,
    at_most: bool = False,
) -> RecipeCard | None:
    """The card of a recipe; None where it has no setting.

    Args:
        facts: The recipe.
        gpus: How many cards take part.
        peak: Predicted memory of a step on one card, in bytes.
        budget: What a card has, in bytes.
        may_fit: Whether the tool's own code may save what is too much.
        at_most: Whether the peak is that of a step that holds all logits, as the tool's own loss was not run.
    """
    setting = facts.setting
    if setting is None:
        return None
    rows = tuple(
        SettingRow(
            name, shown(value), value.source, "" if value.asked is None else str(value.asked), value.why
        )
        for name, value in setting.values()
    )
    own = OWN_LOSS_NOT_RUN.format(tool=setting.tool)
    note, fits = (
        f"at most: {own}" if at_most else "",
        None if peak is None or budget is None else peak <= budget,
    )
    if may_fit:
        note, fits = f"{setting.tool}'s own kernels take less, and it may fit", None
    elif peak is None and facts.shard is not None:
        peak = facts.shard.weights // facts.shard.gpus
        note, fits = "the weights of the base alone", None if facts.shard.fits else False
    return RecipeCard(
        facts.name, setting.tool, rows, tuple(_steps(setting, gpus)), peak, budget, gpus, fits, note
    )


def shown(value: Value) -> str:
    """A value as a table shows it."""
    found: Any = value.value
    if isinstance(found, tuple):
        return ", ".join(map(str, found))
    if isinstance(found, float):
        return f"{found:g}"
    return "-" if found is None else str(found)


def _steps(setting: RunSetting, gpus: int) -> Iterator[tuple[str, str]]:
    """What a step is made of, as far as it is known, and how long the run is."""
    batch, gathered, length = setting.batch_size.value, setting.accumulation.value or 1, setting.seq_len.value
    if isinstance(batch, int) and isinstance(gathered, int):
        sequences = batch * gathered * gpus
        cards = f" x {gpus} GPUs" if gpus > 1 else ""
        yield "sequences a step", f"{sequences:,} ({batch} x {gathered} accumulated{cards})"
        if isinstance(length, int):
            yield "tokens a step, at most", f"{sequences * length:,}"
    if isinstance(setting.max_steps.value, int) and setting.max_steps.value > 0:
        yield "optimizer steps", f"{setting.max_steps.value:,}"
    elif setting.epochs.value is not None:
        yield (
            "epochs",
            f"{setting.epochs.value:g}"
            if isinstance(setting.epochs.value, float)
            else str(setting.epochs.value),
        )
    if setting.warmup_steps.value:
        yield "warm-up", f"{setting.warmup_steps.value} steps"
    elif setting.warmup_ratio.value:
        yield "warm-up", f"{setting.warmup_ratio.value:g} of the steps"
