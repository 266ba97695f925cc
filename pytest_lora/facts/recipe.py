"""Facts about a recipe: the setting of the run that it describes, and what lies beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from pytest_lora.facts.recipe_lines import Clash, Flaw, Repeated, UnknownKey, WrongKind
from pytest_lora.facts.settings import alpha_divisor

GIVEN = "given"
"""Source of a value that a script passes as an argument."""


@dataclass(frozen=True, slots=True)
class Value:
    """One value of the effective setting, and where it is from.

    Attributes:
        value: What the run has; None where it has none, or where it cannot be told.
        source: Where it is from, in words: ``"line 12"``, ``"default of TRL"``, ``"2 x lora_rank"``.
        key: The key that decides it, whether or not it is there; empty where there is none.
        line: The line that decides it, or None.
        asked: What the recipe asks for, where the run has something else; else None.
        why: Why that is so.
    """

    value: Any = None
    source: str = ""
    key: str = ""
    line: int | None = None
    asked: Any = None
    why: str = ""

    @property
    def stated(self) -> bool:
        """Whether a line of the recipe, or an argument of the script, says it."""
        return self.line is not None or self.source == GIVEN


UNKNOWN = Value()


@dataclass(frozen=True, slots=True)
class RunSetting:
    """What a run does, as its recipe and the defaults of its tool have it; names are those of PEFT and transformers.

    Attributes:
        tool: Name of the tool (``"Axolotl"``).
        base: Name or path of the base model.
        adapter: ``"lora"``, or as the tool calls it (``"qlora"``); None where all weights are trained.
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"``, another method, or None.
        double_quant: Whether the constants of the quantization are quantized too.
        quant_storage: Dtype that packed weights are stored in; None for ``uint8``.
        dtype: Dtype in which the base is loaded.
        precision: ``"bf16"``, ``"fp16"``, or None for float32.
        objective: ``"sft"``, ``"dpo"``, ``"kto"``, ...
        gpus: How many take part.
        strategy: ``"ddp"``, ``"zero1"`` to ``"zero3"``, ``"fsdp1"``, ``"fsdp2"``, the last three with ``"_offload"``
            where weights lie in the host's memory; None on one GPU.
        upcast: Parts of parameter names of what the tool casts to float32.
        adapter_dtype: Dtype of the adapter, where the recipe decides it.
        loss_on: ``"all tokens"`` or ``"answers"``.
        loss: ``"full"`` where all logits are held, ``"chunked"`` where they are not.
        kernels: Whether the tool's own fused kernels for LoRA run; None where it has none.
        continues: Folder of the adapter that training goes on from.
        new_tokens: How many tokens are added.
        scope: Part of the base that adapters may touch, as it is called in module names.
        by_trainer: Arguments of ``estimate_memory`` that the trainer of the tool decides, where its own loss is run
            for the estimate.
    """

    tool: str
    base: Value = UNKNOWN
    adapter: Value = UNKNOWN
    quantization: Value = UNKNOWN
    double_quant: Value = UNKNOWN
    quant_storage: Value = UNKNOWN
    dtype: Value = UNKNOWN
    precision: Value = UNKNOWN
    objective: Value = UNKNOWN
    r: Value = UNKNOWN
    lora_alpha: Value = UNKNOWN
    lora_dropout: Value = UNKNOWN
    target_modules: Value = UNKNOWN
    exclude_modules: Value = UNKNOWN
    target_parameters: Value = UNKNOWN
    layers_to_transform: Value = UNKNOWN
    rank_pattern: Value = UNKNOWN
    alpha_pattern: Value = UNKNOWN
    modules_to_save: Value = UNKNOWN
    use_rslora: Value = UNKNOWN
    use_dora: Value = UNKNOWN
    bias: Value = UNKNOWN
    task_type: Value = UNKNOWN
    batch_size: Value = UNKNOWN
    accumulation: Value = UNKNOWN
    seq_len: Value = UNKNOWN
    packing: Value = UNKNOWN
    attention: Value = UNKNOWN
    loss: Value = UNKNOWN
    kernels: Value = UNKNOWN
    gradient_checkpointing: Value = UNKNOWN
    optimizer: Value = UNKNOWN
    learning_rate: Value = UNKNOWN
    schedule: Value = UNKNOWN
    warmup_steps: Value = UNKNOWN
    warmup_ratio: Value = UNKNOWN
    epochs: Value = UNKNOWN
    max_steps: Value = UNKNOWN
    upcast: Value = UNKNOWN
    adapter_dtype: Value = UNKNOWN
    loss_on: Value = UNKNOWN
    eval_strategy: Value = UNKNOWN
    eval_steps: Value = UNKNOWN
    save_strategy: Value = UNKNOWN
    save_steps: Value = UNKNOWN
    load_best_model_at_end: Value = UNKNOWN
    gpus: Value = UNKNOWN
    strategy: Value = UNKNOWN
    continues: Value = UNKNOWN
    new_tokens: Value = UNKNOWN
    scope: Value = UNKNOWN
    by_trainer: tuple[tuple[str, Any], ...] = ()

    def values(self) -> Iterator[tuple[str, Value]]:
        """Every value that is known, by its name."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Value) and (value.source or value.asked is not None):
                yield one.name, value

    @property
    def scaling(self) -> float | None:
        """``alpha / r``, or ``alpha / sqrt(r)`` under rsLoRA; None where either is unknown."""
        rank, alpha = self.r.value, self.lora_alpha.value
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            return None
        return alpha / alpha_divisor(rank, rslora=bool(self.use_rslora.value))


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What is known of the base of a recipe: its name, its dtype, its parameters and the longest context."""

    name: str
    dtype: str | None
    parameters: int
    max_length: int | None


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter folder that a recipe names, as its ``adapter_config.json`` says; None for what that does not say.

    Attributes:
        path: The folder, as the recipe names it.
        r: Its rank.
        base: The base it says it is for.
        kind: ``peft_type``: ``"LORA"``, ``"IA3"``, ...
        alpha: ``lora_alpha``.
        targets: Names of the modules that it adapts, or an expression for them.
        saved: Modules that it holds in full (``modules_to_save``).
        use_rslora: Whether its scaling is that of rsLoRA.
        use_dora: Whether it is a DoRA.
        same_shape: Whether the base it says it is for has the shape of that of the recipe, as far as both are known.
    """

    path: str
    r: int | None
    base: str | None
    kind: str | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | str | None = None
    saved: tuple[str, ...] | str = ()
    use_rslora: bool | None = None
    use_dora: bool | None = None
    same_shape: bool | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """Weights of the base against the memory of each of several cards, in bytes."""

    weights: int
    budget: int
    gpus: int

    @property
    def fits(self) -> bool:
        """Whether a card holds its part of the weights."""
        return self.weights <= self.gpus * self.budget


@dataclass(frozen=True, slots=True)
class RecipeFacts:
    """A recipe.

    Attributes:
        name: Name of the file.
        tool: The tool it is for; None where it is for none that is known, or trains no LoRA adapter.
        left_alone: Why it is not judged, in words; empty where it is.
        flaw: Why the file is no YAML, or None.
        repeated: Keys that stand twice.
        unknown: Keys that nothing reads.
        wrong: Values of the wrong kind.
        clashes: Keys that the tool does not take beside each other.
        setting: The effective setting, or None.
        base: What is known of its base, or None.
        base_is_adapter: The adapter folder that is given as the base, or None.
        continued: The adapter that training goes on from, or None.
        listed: Modules that the recipe lists beside a switch for all linear ones.
        widened: Those of them where the base has more linear modules than these.
        conversational: The data file beside the recipe that holds conversations, or None.
        shard: Weights against each of several cards, where they are divided.
    """

    name: str
    tool: str | None = None
    left_alone: str = ""
    flaw: Flaw | None = None
    repeated: tuple[Repeated, ...] = ()
    unknown: tuple[UnknownKey, ...] = ()
    wrong: tuple[WrongKind, ...] = ()
    clashes: tuple[Clash, ...] = ()
    setting: RunSetting | None = None
    base: BaseModel | None = None
    base_is_adapter: SavedAdapter | None = None
    continued: SavedAdapter | None = None
    listed: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()
    conversational: str | None = None
    shard: Shard | None = None
