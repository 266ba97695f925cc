"""An evaluation between the steps: what the installed trainer holds of its batches, beside the training's own peak."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainingArguments

from pytest_lora import Evaluation, check_memory, estimate_memory, step_memory
from pytest_lora.inspection.memory import dry_run
from pytest_lora.inspection.memory.layer_stacks import Cut
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.memory.setting import checked_setting
from tests.memory.test_trainers import (
    BASE,
    BATCH,
    CONFIG,
    LENGTH,
    POINT,
    SEVEN,
    VOCABULARY,
    Allocations,
    numbers,
    peak_and_largest,
    plain,
    rows,
    tokenizer,
)

ROWS = 4
LOGITS = ROWS * LENGTH * VOCABULARY * 4


def real_evaluation(path: Path, batches: int, **more: Any) -> Allocations:
    """``Trainer.evaluate`` on the CPU, of so many batches."""
    trainer: Any = transformers.Trainer(
        model=get_peft_model(LlamaForCausalLM(BASE), CONFIG),
        args=TrainingArguments(**plain(path), per_device_eval_batch_size=ROWS, disable_tqdm=True),
        eval_dataset=[
            {"input_ids": ids, "labels": ids.clone()} for ids in numbers(batches * ROWS, LENGTH).unbind()
        ],
        **more,
    )
    trainer.model.config.use_cache = False
    gc.collect()
    real = Allocations()
    with real:
        trainer.evaluate()
    return real


@pytest.mark.parametrize("keeps", ["loss", "logits", "predictions"])
def test_an_evaluation_holds_what_a_real_one_holds(keeps: Any, tmp_path: Path) -> None:
    batches = 3
    more: dict[str, Any] = {} if keeps == "loss" else {"compute_metrics": lambda found: {}}
    if keeps == "predictions":
        more["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(dim=-1)
    real = real_evaluation(tmp_path, batches, **more)
    setting = checked_setting(dtype="float32", autocast=False, trainer="transformers")
    asked = replace(setting, batch_size=1, seq_len=LENGTH)
    evaluation = Evaluation(ROWS, keeps=keeps, batches=batches)
    traced = dry_run.evaluated(build(BASE, CONFIG, asked, cut=Cut(0)), asked, evaluation)
    peak, largest = peak_and_largest(traced)
    assert largest == real.largest == (batches * LOGITS if keeps == "logits" else LOGITS)
    assert peak == pytest.approx(real.peak, rel=0.01)
    assert set(traced.phases) == {"evaluation"}


def test_the_larger_of_both_is_the_peak_and_is_named() -> None:
    small = estimate_memory(CONFIG, SEVEN, trainer="trl-sft", evaluation=Evaluation(1), **POINT)
    assert (small.peak_allocated, small.peak_phase) == (small.training_peak, "backward")
    assert 0 < small.evaluation_peak < small.training_peak
    large = estimate_memory(CONFIG, SEVEN, trainer="trl-sft", evaluation=Evaluation(64), **POINT)
    assert (large.peak_allocated, large.peak_phase) == (large.evaluation_peak, "evaluation")
    assert large.training_peak == small.training_peak
    assert large.after_step == small.after_step
    assert "peak allocated, of the evaluation" in str(large)
    assert "peak of the evaluation" in str(small)
    none = estimate_memory(CONFIG, SEVEN, trainer="trl-sft", **POINT)
    assert (none.peak_allocated, none.evaluation_peak) == (small.training_peak, 0)
    assert "evaluation" not in str(none)


def test_kept_logits_grow_with_the_batches_that_stay() -> None:
    def peak(batches: int | None) -> Any:
        asked = Evaluation(4, keeps="logits", batches=batches)
        return estimate_memory(CONFIG, SEVEN, trainer="transformers", evaluation=asked, **POINT)

    one = 4 * 512 * 128_000 * 4
    assert peak(8).peak_allocated - peak(6).peak_allocated == pytest.approx(2 * 2 * one, rel=0.01)
    assert peak(8).peak_allocated >= 16 * one, "in float32, as accelerate hands them on"
    unknown = peak(None)
    assert unknown.bound == "at least"
    assert "without eval_accumulation_steps" in str(unknown)


def test_whether_it_fits_is_judged_by_the_larger(tmp_path: Path) -> None:
    args = TrainingArguments(
        **plain(tmp_path), eval_strategy="steps", per_device_eval_batch_size=64, eval_accumulation_steps=2
    )
    found = estimate_memory(CONFIG, SEVEN, args=args, seq_len=64)
    assert found.setting.evaluation == Evaluation(64, batches=2)
    between = (found.training_peak + found.evaluation_peak) // 2
    report = check_memory(
        CONFIG, SEVEN, batch_size=BATCH, seq_len=64, args=args, budget=between, advise=False
    )
    assert [f.code for f in report.errors] == ["LORA502"]
    assert "in the evaluation" in report.errors[0].observed
    silent = TrainingArguments(**plain(tmp_path))
    assert estimate_memory(CONFIG, SEVEN, args=silent, seq_len=64).evaluation_peak == 0


@pytest.mark.lora_slow
def test_many_points_of_one_evaluation_are_those_of_single_traces() -> None:
    asked = Evaluation(6, keeps="logits", batches=2)
    fitted = step_memory(CONFIG, BASE, trainer="transformers", evaluation=asked)
    points = [(batch, length) for batch in (2, 3, 5) for length in (32, 48, 64, 96)]
    found = {point: fitted.peak_allocated(*point) for point in points}
    for point in points[-2:]:
        alone = step_memory(CONFIG, BASE, trainer="transformers", evaluation=asked, workspace=8_519_681)
        assert found[point] == pytest.approx(alone.peak_allocated(*point), rel=0.0005)


def test_a_wrong_evaluation_is_refused_by_its_part() -> None:
    with pytest.raises(
        TypeError, match=r"^evaluation must be an Evaluation\(batch_size=...\) or None, not 8"
    ):
        estimate_memory(CONFIG, SEVEN, evaluation=cast(Any, 8), **POINT)
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, not 0"):
        Evaluation(0)
    with pytest.raises(ValueError, match=r"^keeps must be one of loss, logits, predictions"):
        Evaluation(1, keeps=cast(Any, "all"))


def test_where_weights_are_cut_an_evaluation_is_not_predicted_and_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^evaluation: it is not predicted where weights are cut"):
        estimate_memory(
            CONFIG, SEVEN, batch_size=1, seq_len=64, gpus=2, strategy="fsdp2", evaluation=Evaluation(1)
        )
    args = TrainingArguments(**plain(tmp_path), eval_strategy="epoch")
    found = estimate_memory(CONFIG, SEVEN, args=args, seq_len=64, gpus=2, strategy="fsdp2")
    assert found.bound == "at least"
    assert "the evaluation, where weights are cut over several GPUs" in str(found)


@pytest.mark.lora_slow
@pytest.mark.parametrize("keeps", ["loss", "logits"])
def test_an_evaluation_of_rewards_holds_what_a_real_one_holds(keeps: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    batches, config = 2, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS")
    texts = [" ".join(["w5"] * (LENGTH - 1))] * (batches * ROWS)  # TRL adds the last token
    arguments = {"per_device_eval_batch_size": ROWS, "disable_tqdm": True, "eval_strategy": "epoch"}
    trainer = trl.RewardTrainer(
        model=LlamaForSequenceClassification(LlamaConfig(**{**BASE.to_dict(), "num_labels": 1})),
        args=trl.RewardConfig(**plain(tmp_path), **arguments),
        train_dataset=rows(chosen=["w6 w7"] * 4, rejected=["w8"] * 4),
        eval_dataset=rows(chosen=texts, rejected=texts),
        processing_class=tokenizer(),
        peft_config=config,
        **({} if keeps == "loss" else {"compute_metrics": lambda found: {}}),
    )
    trainer.model.config._attn_implementation = "eager"
    trainer.model.config.use_cache = False
    assert next(iter(trainer.get_eval_dataloader()))["input_ids"].shape == (2 * ROWS, LENGTH)
    gc.collect()
    real = Allocations()
    with real:
        trainer.evaluate()

    setting = checked_setting(args=trainer.args, dtype="float32", autocast=False)
    asked = replace(setting, batch_size=BATCH, seq_len=LENGTH)
    evaluation = Evaluation(ROWS, keeps=keeps, batches=batches)
    traced = dry_run.evaluated(build(BASE, config, asked, cut=Cut(0)), asked, evaluation)
    peak, largest = peak_and_largest(traced)
    assert largest == real.largest
    assert peak == pytest.approx(real.peak, rel=0.01)


def test_an_evaluation_of_rewards_stands_beside_the_step(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    arguments = trl.RewardConfig(**plain(tmp_path), per_device_eval_batch_size=64, eval_strategy="epoch")
    scored = LoraConfig(r=8, target_modules=["q_proj"], task_type="SEQ_CLS")
    found = estimate_memory(scored, SEVEN, args=arguments, seq_len=512)
    without = estimate_memory(scored, SEVEN, args=trl.RewardConfig(**plain(tmp_path)), seq_len=512)
    assert found.training_peak == without.peak_allocated
    assert found.peak_allocated == found.evaluation_peak > found.training_peak
    alone = step_memory(scored, SEVEN, args=arguments)
    assert alone.estimate(2, 512).evaluation_peak == found.evaluation_peak, "whatever the step's own batch"
