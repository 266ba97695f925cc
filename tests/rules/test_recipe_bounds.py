"""Rules on recipes where they turn: settings made by hand, of which one value is changed at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_lora.facts.recipe import BaseModel, RecipeFacts, RunSetting, SavedAdapter, Shard, Value
from pytest_lora.facts.recipe_lines import UnknownKey, WrongKind
from pytest_lora.rules.recipe import at
from tests.rules.saying import says, told


def v(value: Any, line: int | None = 7, **more: Any) -> Value:
    """A value that the recipe states, or, without a line, one that it does not."""
    return Value(
        value, **{"source": "default of TRL" if line is None else f"line {line}", "line": line, **more}
    )


def facts(tool: str = "TRL", known: dict[str, Any] | None = None, **values: Any) -> RecipeFacts:
    keyed = {name: replace(value, key=value.key or name) for name, value in values.items()}
    return RecipeFacts("recipe.yaml", tool, setting=RunSetting(tool, **keyed), **(known or {}))


def base(parameters: int = 7_000_000_000, dtype: str | None = "bfloat16") -> BaseModel:
    return BaseModel("org/base", dtype, parameters, None)


def rate(
    learning_rate: float | Value, objective: str | None = "sft", parameters: int | None = None, **more: Any
) -> RecipeFacts:
    shown = learning_rate if isinstance(learning_rate, Value) else v(learning_rate)
    values = {"adapter": v("lora"), "learning_rate": shown, "objective": v(objective), **more}
    return facts(known={"base": base(parameters)} if parameters else {}, **values)


TOO_HIGH = "warning: `learning_rate: 0.005` is too high a learning rate for Adam"
TOO_LOW = "is a learning rate of full fine-tuning"
NOTHING = "moves nothing"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (rate(5e-3), TOO_HIGH),
        (rate(4.99e-3), None),
        (rate(5e-3, optimizer=v("SGD")), None),
        (rate(5e-3, optimizer=v("adamw_torch")), TOO_HIGH),
        (rate(v(5e-3, None)), "warning: a rate of 0.005 (default of TRL) is too high"),
        (rate(5e-3, adapter=v(None)), None),
        (rate(v(None)), None),
        (rate(1e-4, "dpo"), "warning: is a learning rate of supervised tuning; dpo"),
        (rate(9.9e-5, "kto"), None),
        (rate(1e-4, "sft"), None),
        (rate(1e-5), f"warning: `learning_rate: 1e-05` {TOO_LOW}"),
        (rate(1.01e-5), None),
        (rate(1e-5, "ppo"), None),
        (rate(2e-5, parameters=7_000_000_000), f"warning: {TOO_LOW}"),
        (rate(2.01e-5, parameters=7_000_000_000), None),
        (rate(2e-5, parameters=29_999_999_999), f"warning: {TOO_LOW}"),
        (rate(2e-5, parameters=30_000_000_000), None),
        (rate(1e-6, "dpo", max_steps=v(9)), f"warning: `learning_rate: 1e-06` times 9 steps (`max_steps`) {NOTHING}"),
        (rate(1e-6, "", max_steps=v(9)), f"warning: {NOTHING}"),
        (rate(5e-6, "dpo", max_steps=v(2)), None),
        (rate(1e-6, "dpo", max_steps=v(-1)), None),
        (rate(1e-6, "dpo", max_steps=v(None)), None),
        (rate(1e-6, "ppo", max_steps=v(9)), None),
        (rate(1e-6, None, max_steps=v(9)), f"warning: {NOTHING}"),
    ],
)  # fmt: skip
def test_rates(given: RecipeFacts, said: str | None) -> None:
    says("rate_is_of_another_method", given, *([said] if said else []))


LEFT = {"r": v(64), "lora_alpha": v(16, None)}


@pytest.mark.parametrize(
    ("values", "is_told"),
    [
        (LEFT, True),
        ({**LEFT, "r": v(63)}, False),
        ({**LEFT, "r": v(1)}, True),
        ({**LEFT, "r": v(2)}, False),
        ({**LEFT, "r": v(64, None)}, False),
        ({**LEFT, "lora_alpha": v(16)}, False),
        ({**LEFT, "lora_alpha": v(16, None, source="2 x lora_rank")}, False),
        ({**LEFT, "lora_alpha": v(None, None)}, False),
        ({**LEFT, "use_rslora": v(True)}, False),
        ({"r": v(4096), "lora_alpha": v(16, None), "use_rslora": v(True)}, False),
    ],
)
def test_an_alpha_that_nobody_wrote(values: dict[str, Value], is_told: bool) -> None:
    said = f"warning: `r: {values['r'].value}` with an alpha of 16 (default of TRL) has a scaling of"
    says("alpha_is_left_over", facts(**values), *([said] if is_told else []))


BEST = {"load_best_model_at_end": v(True)}
MULTIPLE = "error: `save_steps` 500 is no multiple of `eval_steps` 200"
STRATEGIES = "error: `eval_strategy` is steps and `save_strategy` is epoch"


def best(tool: str = "TRL", **values: Any) -> RecipeFacts:
    return facts(tool, **{**BEST, **{name: v(value) for name, value in values.items()}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (best(eval_strategy="no"), "error: nothing is evaluated"),
        (best("LLaMA-Factory", eval_strategy="no"), "error: nothing is evaluated"),
        (best("Axolotl", eval_strategy="no"), None),
        (best(eval_strategy="steps", save_strategy="epoch"), STRATEGIES),
        (best(eval_strategy="steps", save_strategy="steps"), None),
        (best(eval_strategy="steps", save_strategy="best"), None),
        (best(eval_strategy="best", save_strategy="steps"), None),
        (best(eval_steps=200, save_steps=500), MULTIPLE),
        (best(eval_steps=200, save_steps=500), "error: write `save_steps: 400`"),
        (best(eval_steps=200, save_steps=50), "error: write `save_steps: 200`"),
        (best(eval_steps=100, save_steps=500), None),
        (best(eval_steps=None, save_steps=500), None),
        (best(eval_steps=200, save_steps=None), None),
        (best(eval_steps=0.3, save_steps=500), None),
        (best(eval_steps=200, save_steps=0.3), None),
        (best(eval_steps=1, save_steps=1.5), "error: `save_steps` 1.5 is no multiple of `eval_steps` 1"),
        (best(eval_steps=1.5, save_steps=1), "error: `save_steps` 1 is no multiple of `eval_steps` 1.5"),
        (facts(load_best_model_at_end=v(True, None), eval_strategy=v("no")), None),
        (facts(load_best_model_at_end=v(False), eval_strategy=v("no")), None),
        (RecipeFacts("recipe.yaml"), None),
    ],
)
def test_a_best_model_that_is_not_kept(given: RecipeFacts, said: str | None) -> None:
    says("best_model_cannot_be_kept", given, *([said] if said else []))


def warm_up(**values: Any) -> RecipeFacts:
    return facts(**{name: v(value) for name, value in values.items()})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (warm_up(max_steps=20, warmup_steps=20), "error: the warm-up takes 20 steps and the run ends after 20"),
        (warm_up(max_steps=20, warmup_steps=19), None),
        (warm_up(max_steps=19, warmup_steps=20), "info: write `warmup_steps: 1`"),
        (warm_up(max_steps=60, warmup_steps=60), "error: write `warmup_steps: 3`"),
        (warm_up(max_steps=1, warmup_steps=1), "info: write `warmup_steps: 1`"),
        (warm_up(max_steps=-1, warmup_steps=20), None),
        (warm_up(max_steps=0, warmup_steps=20), None),
        (warm_up(max_steps=20, warmup_steps=0), None),
        (warm_up(max_steps=20), None),
        (warm_up(warmup_ratio=1), "error: a warm-up of 1 times the run never ends"),
        (warm_up(warmup_ratio=0.99), None),
        (warm_up(warmup_ratio=2, warmup_steps=5), None),
        (RecipeFacts("recipe.yaml"), None),
    ],
)  # fmt: skip
def test_a_warm_up_against_the_run(given: RecipeFacts, said: str | None) -> None:
    says("warm_up_is_longer_than_the_run", given, *([said] if said else []))


@pytest.mark.parametrize(
    ("given", "beginnings"),
    [
        (warm_up(schedule="constant", warmup_steps=5, warmup_ratio=0.1), ["`warmup_steps: 5`", "`warmup_ratio: 0.1`"]),
        (facts(schedule=v("constant"), warmup_steps=v(0)), []),
        (facts(schedule=v("constant"), warmup_steps=v(5, None)), []),
        (facts(schedule=v("cosine"), warmup_steps=v(5)), []),
        (RecipeFacts("recipe.yaml"), []),
    ],
)  # fmt: skip
def test_a_warm_up_that_the_schedule_does_not_take(given: RecipeFacts, beginnings: list[str]) -> None:
    says("warm_up_is_ignored", given, *(f"warning: {one} has no effect" for one in beginnings))


def packed(
    tool: str, packing: Any = True, attention: str | None = None, objective: str = "sft"
) -> RecipeFacts:
    return facts(tool, packing=v(packing), attention=v(attention, key="attn"), objective=v(objective))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (packed("TRL"), "warning: with no attention backend (none is named)"),
        (packed("TRL", attention="sdpa"), "warning: write `attn: flash_attention_2`"),
        (packed("ms-swift", attention="sdpa"), "warning: write `attn: flash_attn`"),
        (packed("TRL", attention="flash_attention_2"), None),
        (packed("Axolotl"), "warning: add `attn_implementation: flash_attention_2`"),
        (packed("Axolotl", attention="sdpa"), None),
        (packed("LLaMA-Factory"), "warning: add `neat_packing: true`"),
        (packed("LLaMA-Factory", attention="sdpa"), "warning: with sdpa attention"),
        (packed("LLaMA-Factory", "separate"), None),
        (packed("LLaMA-Factory", objective="pt"), None),
        (packed("another"), None),
        (packed("TRL", False), None),
        (facts(packing=v(True, None)), None),
        (RecipeFacts("recipe.yaml"), None),
    ],
)
def test_samples_that_are_mixed(given: RecipeFacts, said: str | None) -> None:
    says("packing_mixes_samples", given, *([said] if said else []))


def whole(known: BaseModel | None, dtype: Value) -> RecipeFacts:
    return facts(known={"base": known}, dtype=dtype)


FLOAT32 = v("float32", None)


@pytest.mark.parametrize(
    ("given", "is_told"),
    [
        (whole(base(1_000_000_000), FLOAT32), True),
        (whole(base(999_999_999), FLOAT32), False),
        (whole(base(dtype="float32"), FLOAT32), False),
        (whole(None, FLOAT32), False),
        (whole(base(), v("bfloat16", None)), False),
        (whole(base(), v("float32")), False),
        (whole(base(), v("float32", None, source="the base")), False),
        (RecipeFacts("recipe.yaml", base=base()), False),
    ],
)
def test_a_base_in_float32(given: RecipeFacts, is_told: bool) -> None:
    says("weights_are_loaded_in_float32", given, *(["warning: no `dtype` is given"] if is_told else []))


def test_what_float32_costs_is_counted() -> None:
    given = whole(base(2**30), FLOAT32)
    says("weights_are_loaded_in_float32", given, "warning: bfloat16: 4.0 GiB of weights instead of 2.0")


@pytest.mark.parametrize(
    ("known", "precision", "is_told"),
    [
        (base(), v("fp16"), True),
        (base(), v("bf16"), False),
        (base(), v("fp16", None), False),
        (base(dtype="float16"), v("fp16"), False),
        (None, v("fp16"), False),
    ],
)
def test_float16_on_bfloat16(known: BaseModel | None, precision: Value, is_told: bool) -> None:
    given = facts(known={"base": known}, precision=precision)
    says(
        "float16_on_a_bfloat16_base",
        given,
        *(["warning: `precision` computes in float16"] if is_told else []),
    )
    says("float16_on_a_bfloat16_base", replace(given, setting=None))


SAVED = SavedAdapter("out", 8, "org/base", "LORA", 16.0, ("q_proj", "v_proj"), ("head",), False, False, True)


@pytest.mark.parametrize(
    ("values", "beginnings"),
    [
        ({"lora_alpha": v(32)}, ["warning: `lora_alpha` says 32, and"]),
        ({"lora_alpha": v(16)}, []),
        ({"lora_alpha": v(32, None)}, []),
        ({"lora_alpha": v(None)}, []),
        ({"use_rslora": v(True), "use_dora": v(False)}, ["warning: write `use_rslora: false`"]),
        ({"use_rslora": v(False), "use_dora": v(True)}, ["warning: write `use_dora: false`"]),
        ({"target_modules": v(("q_proj",))}, ["warning: write `target_modules: [q_proj, v_proj]`"]),
        ({"target_modules": v(("v_proj", "q_proj"))}, []),
        ({"target_modules": v(("q_proj",), None)}, []),
        ({"target_modules": v("all-linear")}, ["warning: `target_modules` says all-linear"]),
        ({"target_modules": v(".*_proj")}, []),
        ({"modules_to_save": v(("head", "embed"))}, ["warning: `modules_to_save` says [head, embed]"]),
        ({"modules_to_save": v(("head",))}, []),
        ({"modules_to_save": v("head")}, []),
        ({"modules_to_save": v(("embed",), None)}, []),
    ],
)  # fmt: skip
def test_what_differs_from_the_folder(values: dict[str, Value], beginnings: list[str]) -> None:
    says("continued_adapter_is_another", facts(known={"continued": SAVED}, **values), *beginnings)
    says("continued_adapter_is_another", facts(**values))
    says("continued_adapter_is_another", RecipeFacts("recipe.yaml", continued=SAVED))


@pytest.mark.parametrize(
    ("change", "values", "beginnings"),
    [
        ({"kind": "IA3"}, {"lora_alpha": v(32)}, ["error: the adapter in out is of another method (IA3)"]),
        ({"kind": None}, {"lora_alpha": v(32)}, ["warning: `lora_alpha` says 32"]),
        ({"same_shape": False}, {"lora_alpha": v(32)}, ["error: the adapter in out is for org/base"]),
        ({"same_shape": None}, {"lora_alpha": v(32)}, ["warning: `lora_alpha` says 32"]),
        ({"alpha": None}, {"lora_alpha": v(32)}, []),
        ({"targets": ".*"}, {"target_modules": v("all-linear")}, []),
        ({"targets": ("q_proj", "up_proj")}, {"target_modules": v("all-linear")}, []),
        ({"alpha": 16.5}, {"lora_alpha": v(32)}, ["warning: write `lora_alpha: 16.5`"]),
    ],
)
def test_another_folder(change: dict[str, Any], values: dict[str, Value], beginnings: list[str]) -> None:
    known = {"continued": replace(SAVED, **change)}
    says("continued_adapter_is_another", facts(known=known, **values), *beginnings)


@pytest.mark.parametrize(
    ("change", "rank", "is_told"),
    [
        ({}, v(16), True),
        ({}, v(8), False),
        ({}, v(16, None), False),
        ({}, v(None), False),
        ({"r": None}, v(16), False),
    ],
)
def test_the_rank_of_the_folder(change: dict[str, Any], rank: Value, is_told: bool) -> None:
    given = facts(known={"continued": replace(SAVED, **change)}, r=rank, continues=v("out"))
    said = ["warning: write `r: 8`, or start without `continues`"] if is_told else []
    says("continued_adapter_has_another_rank", given, *said)
    says("continued_adapter_has_another_rank", replace(given, setting=None))
    says("continued_adapter_has_another_rank", replace(given, continued=None))


ITS_BASE = "the base that the adapter was trained on"


@pytest.mark.parametrize(
    ("tool", "change", "rank", "fix"),
    [
        ("Axolotl", {}, v(16), "write `base: org/base` and `lora_model_dir: out`, and `r: 8`, its rank"),
        ("Axolotl", {}, v(8), "write `base: org/base` and `lora_model_dir: out`"),
        ("Axolotl", {}, v(16, None), "write `base: org/base` and `lora_model_dir: out`"),
        ("Axolotl", {"r": None}, v(16), "write `base: org/base` and `lora_model_dir: out`"),
        ("x", {"base": None}, v(8), f"write `base: {ITS_BASE}` and `the key for the adapter to go on from: out`"),
    ],
)  # fmt: skip
def test_a_folder_of_an_adapter_as_base(tool: str, change: dict[str, Any], rank: Value, fix: str) -> None:
    given = facts(tool, known={"base_is_adapter": replace(SAVED, **change)}, base=v("out"), r=rank)
    assert [one.fix for one in told("adapter_folder_is_the_base", given)] == [fix]
    says("adapter_folder_is_the_base", replace(given, setting=None))
    says("adapter_folder_is_the_base", replace(given, base_is_adapter=None))


@pytest.mark.parametrize(
    ("weights", "gpus", "said"),
    [
        (160 * 2**30, 2, None),
        (
            160 * 2**30 + 1,
            2,
            "error: the weights take 160.0 GiB, 80.0 GiB on each of 2 cards, more than the 80.0 GiB",
        ),
        (161 * 2**30, 2, "error: take 5 cards or more (`gpus=5`)"),
    ],
)
def test_weights_on_cards(weights: int, gpus: int, said: str | None) -> None:
    given = facts(known={"shard": Shard(weights, 80 * 2**30, gpus)}, strategy=v("fsdp1"))
    says("shards_do_not_fit", given, *([said] if said else []))
    says("shards_do_not_fit", replace(given, setting=None))
    says("shards_do_not_fit", replace(given, shard=None))


def unknown(kind: Any = "unknown", **more: Any) -> RecipeFacts:
    fields = {"key": "lora_rnk", "line": 3, "text": "lora_rnk: 8", "meant": None, "since": "", "stops": False}
    return RecipeFacts("recipe.yaml", "TRL", unknown=(UnknownKey(**{**fields, "kind": kind, **more}),))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (unknown(), "warning: `lora_rnk` is not a known key: TRL ignores it, and its setting never happens"),
        (unknown(), "warning: remove `lora_rnk: 8`"),
        (unknown(meant="lora_r"), "warning: write `lora_r: 8` in its place"),
        (unknown(meant="lora_r"), "warning: `lora_rnk` is not a known key; did you mean `lora_r`?"),
        (unknown(stops=True), "error: `lora_rnk` is not a known key: TRL stops at it"),
        (unknown("block"), "error: `lora_rnk` is a nested block"),
        (unknown("dropped"), "warning: `lora_rnk` is dropped on the way"),
        (unknown("removed", since="5.0"), "warning: `lora_rnk` is not known any more: removed in 5.0"),
        (
            unknown("renamed", meant="lora_r"),
            "warning: `lora_rnk` is not a known key; did you mean `lora_r`?",
        ),
    ],
)
def test_keys_that_nothing_reads(given: RecipeFacts, said: str) -> None:
    says("key_is_not_known", given, said)


@pytest.mark.parametrize(
    ("stops", "wanted", "severity"),
    [(True, "a word", "error"), (True, "a number", "warning"), (False, "a word", "warning")],
)
def test_values_of_the_wrong_kind(stops: bool, wanted: str, severity: str) -> None:
    wrong = WrongKind("fp16", 3, "no", "false", wanted, '"no"', stops)
    given = RecipeFacts("recipe.yaml", "TRL", wrong=(wrong,))
    says("value_has_the_wrong_kind", given, f"{severity}: `fp16: no` is false")


@pytest.mark.parametrize(
    ("conversational", "loss_on", "is_told"),
    [("train.jsonl", "all tokens", True), (None, "all tokens", False), ("train.jsonl", "answers", False)],
)
def test_a_loss_on_prompts(conversational: str | None, loss_on: str, is_told: bool) -> None:
    given = facts(known={"conversational": conversational}, loss_on=v(loss_on))
    said = ["warning: train.jsonl holds conversations"] if is_told else []
    says("loss_is_on_prompts", given, *said)
    says("loss_is_on_prompts", replace(given, setting=None))


def test_what_is_asked_for_and_does_not_happen() -> None:
    asked = Value(asked="nf4", why="bits alone do nothing", key="quantization_bit", line=3)
    lone = "error: the recipe asks for nf4, and nothing is quantized: bits alone do nothing"
    says("quantization_does_not_happen", facts("LLaMA-Factory", quantization=asked), lone)
    says(
        "quantization_does_not_happen",
        facts("LLaMA-Factory", quantization=asked),
        "error: write `quantization_bit",
    )
    says("quantization_does_not_happen", facts("TRL", quantization=asked), "error: set both the method")
    says("quantization_does_not_happen", facts("TRL", quantization=v("nf4")))
    says("quantization_does_not_happen", RecipeFacts("recipe.yaml"))
    off = Value(asked="lora_r", why="it is off", key="use_peft", line=3)
    says("adapter_is_never_made", facts(adapter=off), "error: write `use_peft: true`")
    says("adapter_is_never_made", facts(adapter=replace(off, key="adapter")), "error: write `adapter: lora`")
    says("adapter_is_never_made", facts(adapter=v("lora")))
    says("adapter_is_never_made", RecipeFacts("recipe.yaml"))
    widened = facts(known={"widened": ("q_proj",)})
    says("targets_are_widened", widened, "warning: `lora_target_modules` names q_proj")
    says("targets_are_widened", replace(widened, widened=()))
    says("targets_are_widened", replace(widened, setting=None))


def test_places_in_words() -> None:
    given = RecipeFacts("recipe.yaml")
    assert [at(given, None), at(given, 3), at(given, 3, "r")] == [
        "recipe.yaml",
        "recipe.yaml:3",
        "recipe.yaml:3: r",
    ]
