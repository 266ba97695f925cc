"""A recipe of TRL is estimated as its trainer trains: its own loss, and both answers of a pair."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import check_recipe, estimate_memory
from pytest_lora.facts.figures.recipes import RecipeCard
from pytest_lora.findings import Report
from tests.recipe.test_settings import TRL, setting

STEP = "dtype: bfloat16\nlora_target_modules: all-linear\nper_device_train_batch_size: 4\nmax_length: 128\n"
TOO_LARGE = ("LORA501", "LORA502", "LORA506")


def base(vocabulary: int = 32000) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )


def judged(folder: Path, more: str, on: LlamaConfig, budget: str = "80GiB") -> tuple[RecipeCard, Report]:
    path = folder / "recipe.yaml"
    path.write_text(TRL + STEP + more)
    report = check_recipe(path, base=on, budget=budget)
    (card,) = report.figures
    assert isinstance(card, RecipeCard)
    return card, report


def by_hand(on: LlamaConfig, args: Any = None, task: str = "CAUSAL_LM", **given: Any) -> int:
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type=task)
    given = {"batch_size": 4, "seq_len": 128, "optimizer": "adamw_torch_fused", **given}
    return estimate_memory(config, on, args=args, **given).peak_allocated


@pytest.mark.parametrize(
    ("more", "kind", "fields", "given"),
    [
        ("", "SFT", {}, {}),
        ("packing: true\nloss_type: dft\n", "SFT", {"packing": True, "loss_type": "dft"}, {}),
        (
            "packing: true\npacking_strategy: wrapped\n",
            "SFT",
            {"packing": True, "packing_strategy": "wrapped"},
            {},
        ),
        ("load_in_4bit: true\nbf16: false\n", "SFT", {}, {"quantization": "nf4", "autocast": False}),
        ("gradient_checkpointing: false\n", "SFT", {"gradient_checkpointing": False}, {}),
        (
            "gradient_checkpointing_kwargs:\n  use_reentrant: true\n",
            "SFT",
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {},
        ),
        ("use_liger_kernel: true\n", "SFT", {"use_liger_kernel": True}, {}),
        ("beta: 0.2\nprecompute_ref_log_probs: true\n", "DPO", {"precompute_ref_log_probs": True}, {}),
        (
            "loss_type: [ipo, sft]\nloss_weights: [1.0, 0.5]\n",
            "DPO",
            {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
            {},
        ),
        ("loss_type: apo_zero_unpaired\n", "KTO", {"loss_type": "apo_zero_unpaired"}, {}),
        ("lora_task_type: SEQ_CLS\n", "Reward", {}, {"task": "SEQ_CLS"}),
    ],
)
def test_a_recipe_takes_what_its_trainer_takes(
    more: str, kind: str, fields: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    args = getattr(trl, f"{kind}Config")(
        str(tmp_path), per_device_train_batch_size=4, max_length=128, bf16=False, **fields
    )
    card, _ = judged(tmp_path, more, base())
    assert card.peak == by_hand(base(), args, **{"autocast": "bfloat16", **given})
    assert (card.fits, card.note) == (True, "")


@pytest.mark.parametrize(("more", "pairs"), [("", 1), ("beta: 0.1\n", 2)], ids=["SFT", "DPO"])
def test_a_step_that_holds_no_logits_fits_where_one_with_all_of_them_does_not(
    more: str, pairs: int, tmp_path: Path
) -> None:
    pytest.importorskip("trl", minversion="1.16")
    plain = by_hand(base(), gradient_checkpointing=True, batch_size=4 * pairs)
    card, report = judged(tmp_path, more, base(), f"{plain // 2}B")
    assert card.fits, (card.peak, plain)
    assert not report.not_judged
    assert not [one for one in report.findings if one.code in TOO_LARGE]


@pytest.mark.parametrize(
    ("more", "pairs"), [("", 1), ("beta: 0.1\nuse_liger_kernel: true\n", 2)], ids=["SFT", "DPO"]
)
def test_without_trl_the_estimate_is_at_most(
    more: str, pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    on = base(32064)
    plain = by_hand(on, gradient_checkpointing=True, batch_size=4 * pairs)
    card, report = judged(tmp_path, more, on)
    assert (card.peak, card.fits) == (plain, True)
    assert "at most: TRL's own loss" in card.note
    assert not report.not_judged
    card, report = judged(tmp_path, more, on, f"{plain - 1}B")
    assert (card.peak, card.fits) == (plain, None)
    ((why, what),) = report.not_judged
    assert why.startswith("the peak is at most: TRL's own loss")
    assert what == "whether a step fits"
    assert not [one for one in report.findings if one.code in TOO_LARGE]
    card, report = judged(tmp_path, more, on, "1MiB")
    assert card.fits is False
    assert [one for one in report.findings if one.code in TOO_LARGE]


@pytest.mark.parametrize(
    ("more", "objective", "trainer", "rate"),
    [
        ("", "sft", "trl-sft", 2e-5),
        ("loss_type: chunked_nll\n", "sft", "trl-sft", 2e-5),
        ("loss_type: of_my_own\n", "sft", "trl-sft", 2e-5),
        ("max_prompt_length: 64\n", "dpo", "trl-dpo", 1e-6),
        ("loss_type: sigmoid\n", "dpo", "trl-dpo", 1e-6),
        ("beta: 0.1\ndesirable_weight: 1.5\n", "kto", "trl-kto", 1e-6),
        ("center_rewards_coefficient: 0.01\n", "reward", "trl-reward", 1e-4),
        ("beta: 0.04\nnum_generations: 8\n", "grpo", None, 1e-6),
        ("beta: 0.04\nloss_type: dr_grpo\n", "grpo", None, 1e-6),
    ],
)
def test_the_keys_say_the_trainer_and_with_it_the_rate(
    more: str, objective: str, trainer: str | None, rate: float, tmp_path: Path
) -> None:
    found = setting(tmp_path, TRL + more)
    assert found.learning_rate.value == rate
    assert found.objective.value == objective
    assert dict(found.by_trainer).get("trainer") == trainer


@pytest.mark.parametrize(
    ("more", "free"),
    [
        ("padding_free: true\n", True),
        ("packing: true\n", True),
        ("packing: true\npacking_strategy: wrapped\n", None),
        ("beta: 0.1\npadding_free: true\n", None),
    ],
)
def test_only_sft_runs_without_padding(more: str, free: bool | None, tmp_path: Path) -> None:
    assert dict(setting(tmp_path, TRL + more).by_trainer).get("padding_free") is free


def test_weights_of_several_losses_are_numbers(tmp_path: Path) -> None:
    text = "loss_type: [ipo, sft]\nloss_weights: [1.0, a, 0.5]\n"
    args = dict(dict(setting(tmp_path, TRL + text).by_trainer)["args"])
    assert args == {"loss_type": ("ipo", "sft"), "loss_weights": (1.0, 0.5)}
    one = dict(setting(tmp_path, f"{TRL}loss_type: ipo\nloss_weights: 2.0\n").by_trainer)["args"]
    assert dict(one) == {"loss_type": ("ipo",)}
