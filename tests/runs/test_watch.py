"""LoraHealthCallback in real Trainer runs, and watch_training in a loop of one's own."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pytest_lora import LoraHealthCallback, LoraHealthError, LoraHealthWarning, watch_training
from pytest_lora.bases.tiny import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, load_tiny, sample_texts, text_batch
from pytest_lora.runs.watch import Watch

ROWS = [
    {name: tensor[0] for name, tensor in text_batch([text], batch_size=1, seq_len=48).items()}
    for text in sample_texts(32)
]


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def adapted(base: Callable[[], Any] = small) -> torch.nn.Module:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = base()
    torch.manual_seed(0)
    return get_peft_model(model, config)


def trainer(folder: Path, callback: LoraHealthCallback, model: Any = None, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return Trainer(
        model=model or adapted(),
        args=TrainingArguments(**arguments),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        callbacks=[callback],
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", LoraHealthWarning)
        yield


def test_a_healthy_run_passes_in_silence(tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="raise")
    trainer(tmp_path, callback, adapted(load_tiny), eval_strategy="steps", eval_steps=4).train()
    assert callback.watch.count == 12
    assert callback.watch.total_steps == 12
    assert callback.watch.learning_rate == 2e-3
    assert not any(report.errors or report.warnings for report in callback.watch.reports)


@pytest.fixture(scope="module")
def healthy() -> torch.nn.Module:
    """To look at only."""
    return adapted()


def poisoned() -> torch.nn.Module:
    """A model whose loss is NaN from the first step on, which the Trainer logs as 0."""
    model: Any = adapted()
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits * math.nan)
    poisoned_model: torch.nn.Module = model
    return poisoned_model


@pytest.mark.parametrize("filtered", [True, False])
def test_a_run_that_is_nan_raises(tmp_path: Path, filtered: bool) -> None:
    run = trainer(tmp_path, LoraHealthCallback(on_error="raise"), poisoned(), logging_nan_inf_filter=filtered)
    with pytest.raises(LoraHealthError, match="LORA207" if filtered else "LORA340"):
        run.train()
    assert run.state.global_step <= 2


def test_a_run_that_is_nan_stops(tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="stop")
    run = trainer(tmp_path, callback, poisoned(), logging_nan_inf_filter=False)
    with pytest.warns(LoraHealthWarning) as told:
        run.train()
    own = [str(warning.message) for warning in told if issubclass(warning.category, LoraHealthWarning)]
    assert "LORA340" in own[0]
    assert run.state.global_step == 1
    assert callback.watch.should_stop


def test_a_run_that_is_nan_is_told_once_and_goes_on(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, LoraHealthCallback(), poisoned(), logging_nan_inf_filter=False, max_steps=5, logging_steps=2
    )
    with pytest.warns(LoraHealthWarning) as told:
        run.train()
    assert sum("LORA340" in str(one.message) for one in told) == 1
    assert run.state.global_step == 5


def test_a_callback_that_is_added_twice_hears_each_loss_once(tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="raise")
    run = trainer(tmp_path, callback, max_steps=3)
    run.add_callback(callback)
    run.train()
    assert callback.watch.count == 3
    assert callback.watch.steps_per_loss == 1
    assert not callback.watch.reports


class Crash(TrainerCallback):
    """Ends a run after its second step, as a full disk would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise OSError("no space left on device")


def test_a_run_that_crashed_can_be_started_again(tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="raise")
    run = trainer(tmp_path, callback, max_steps=3)
    crash = Crash()
    run.add_callback(crash)
    with pytest.raises(OSError, match="no space left"):
        run.train()
    assert callback.watch.count == 1
    run.remove_callback(crash)
    run.train()
    assert callback.watch.count == 3
    assert not callback.watch.reports


def test_a_resumed_run_is_judged_with_its_earlier_losses(tmp_path: Path) -> None:
    trainer(tmp_path, LoraHealthCallback(), max_steps=2, save_strategy="steps", save_steps=2).train()
    callback = LoraHealthCallback(on_error="raise")
    run = trainer(tmp_path, callback, max_steps=5, eval_strategy="steps", eval_steps=2)
    run.train(resume_from_checkpoint=True)
    assert callback.watch.count == 5
    assert callback.watch.steps_per_loss == 1
    assert not callback.watch.reports


class Reset(TrainerCallback):
    """Takes the first layer's adapter back to its start after the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 3:
            for name, parameter in given["model"].named_parameters():
                if "layers.0." in name and "lora_B" in name:
                    parameter.requires_grad_(False).zero_()


def test_a_resumed_run_is_looked_at_again_after_its_first_steps(tmp_path: Path) -> None:
    trainer(tmp_path, LoraHealthCallback(), max_steps=2, save_strategy="steps", save_steps=2).train()
    run = trainer(tmp_path, LoraHealthCallback(), max_steps=6)
    run.add_callback(Reset())
    with pytest.raises(LoraHealthWarning, match="LORA224"):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4


def test_earlier_losses_are_not_those_of_the_first_steps() -> None:
    model = on_attention(modules_to_save=["lm_head"])
    cut(model, everywhere(model)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    watch = Watch(on_error="raise")
    watch.recall([0.0, 0.0], {})
    for _ in range(2):
        loss = model(**text_batch(seq_len=48)).loss
        loss.backward()
        watch.before_step(model, optimizer)
        optimizer.step()
        watch.after_step()
    watch._train.append(float(loss.detach()))
    with pytest.raises(LoraHealthError, match="LORA313"):
        watch.judge_first_steps()


def test_a_merged_adapter_is_told_before_the_first_step(tmp_path: Path) -> None:
    model: Any = adapted()
    model.merge_adapter()
    run = trainer(tmp_path, LoraHealthCallback(on_error="raise"), model)
    with pytest.raises(LoraHealthError, match="LORA203"):
        run.train()
    assert run.state.global_step == 0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="on_error must be one of"):
        LoraHealthCallback(on_error="ignore")
    with pytest.raises(ValueError, match="model_steps must be at least 1, not 0"):
        LoraHealthCallback(model_steps=0)
    with pytest.raises(TypeError, match=r"model_steps must be a whole number of steps, not 1\.5"):
        LoraHealthCallback(model_steps=1.5)
    with pytest.raises(TypeError, match="expect must be an Expect, not 'train'"):
        LoraHealthCallback(expect="train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": "100"}, "total_steps must be a whole number of steps, not '100'"),
        ({"total_steps": 0}, "total_steps must be at least 1, not 0"),
        ({"steps_per_loss": 0}, "steps_per_loss must be at least 1, not 0"),
        (
            {"optimizer": torch.optim.AdamW},
            "optimizer must be a torch.optim.Optimizer, not <class 'torch.optim.adamw.AdamW'>",
        ),
        ({"expect": {}}, "expect must be an Expect, not {}"),
        ({"model": torch.nn.Linear(2, 2)}, "model must carry LoRA layers, but this Linear has none"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_watch_are_named_before_the_loop(
    healthy: torch.nn.Module, arguments: dict[str, Any], message: str
) -> None:
    wanted = pytest.raises((TypeError, ValueError), match=re.escape(message))
    with wanted, watch_training(**{"model": healthy, **arguments}):
        pytest.fail("the loop was entered")


@pytest.mark.parametrize(
    "loss",
    [None, "1.0", torch.ones(3), torch.ones((), device="meta"), {"loss": 1.0}],
    ids=["None", "str", "vector", "meta", "dict"],
)
def test_a_loss_that_is_no_number_is_named(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"^loss must be (a|one) number, not"):
        Watch().log(loss)
    with pytest.raises(TypeError, match=r"^loss must be (a|one) number, not"):
        Watch().log_eval(loss)


def test_a_loss_may_be_any_one_number() -> None:
    watch = Watch()
    for loss in (2, 1.9, np.float32(1.8), torch.tensor([1.7], requires_grad=True)):
        watch.log(loss)
    assert watch.count == 4


def loop(steps: int = 6) -> tuple[torch.nn.Module, torch.optim.Optimizer, Iterator[torch.Tensor]]:
    model = adapted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    def losses() -> Iterator[torch.Tensor]:
        for _ in range(steps):
            loss = model(**text_batch(seq_len=48)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    return model, optimizer, losses()


def test_a_healthy_loop_passes_in_silence() -> None:
    model, optimizer, losses = loop()
    with watch_training(model, optimizer, total_steps=100, on_error="raise") as watch:
        for loss in losses:
            watch.log(loss, eval_loss=loss)
    assert watch.count == 6
    assert watch.learning_rate == 2e-3
    assert not watch.should_stop


def fed(on_error: str, losses: Iterable[float]) -> Watch:
    """A loop that logs these losses, and ends itself when it is told to."""
    model, optimizer, _ = loop()
    with watch_training(model, optimizer, on_error=on_error) as watch:
        for loss in losses:
            watch.log(loss)
            if watch.should_stop:
                break
    return watch


def test_a_loop_can_stop_itself() -> None:
    with pytest.warns(LoraHealthWarning, match="LORA340"):
        watch = fed("stop", [2.0, 1.9, math.nan, math.nan])
    assert watch.count == 3


def test_a_loop_is_judged_at_its_end() -> None:
    with pytest.raises(LoraHealthError, match=r"from 0\.002 to 0\.0002"):
        fed("raise", [1.0, 1.5, 2.5, 4.0, 6.0, 6.5, 6.4, 6.6])


def on_a_plateau(watch: Watch) -> None:
    for value in np.random.default_rng(0).normal(2.0, 0.03, 60):
        watch.log(value)
    watch.judge()


def test_the_advice_on_a_plateau_has_the_numbers_of_the_adapter(healthy: torch.nn.Module) -> None:
    watch = Watch(total_steps=300)
    watch.look(healthy, torch.optim.AdamW((p for p in healthy.parameters() if p.requires_grad), lr=2e-4))
    with pytest.warns(LoraHealthWarning, match="LORA344"):
        on_a_plateau(watch)
    (fix,) = [one.fix for report in watch.reports for one in report.findings if one.severity == "warning"]
    assert "from 8 to 16 and lora_alpha with it from 16 to 32" in fix
    assert "the learning rate of 0.0002 can stay" in fix
    assert re.search(r"which costs the \d+ steps so far and all 300 anew, \d+% more than planned", fix)


def test_an_error_of_the_loop_itself_is_not_covered_up() -> None:
    with pytest.raises(ZeroDivisionError):
        fed("raise", (1 / n for n in (1, 0)))


def test_the_copies_of_what_trains_go_with_the_loop() -> None:
    model, optimizer, losses = loop(1)

    def break_off() -> None:
        watch.log(next(losses))
        raise KeyError

    with pytest.raises(KeyError), watch_training(model, optimizer) as watch:
        break_off()
    assert watch._first_steps is None
    assert not vars(optimizer)["_optimizer_step_pre_hooks"]


def test_watches_of_one_optimizer_hear_each_its_own() -> None:
    model, optimizer, losses = loop(3)
    with (
        watch_training(model, optimizer, on_error="raise") as outer,
        watch_training(model, optimizer, on_error="raise") as inner,
    ):
        for loss in losses:
            outer.log(loss)
            inner.log(loss)
    assert (outer.count, inner.count) == (3, 3)
    assert not (*outer.reports, *inner.reports)
    assert not vars(optimizer)["_optimizer_step_pre_hooks"]


def test_an_optimizer_that_is_replaced_is_no_fault() -> None:
    model, first, losses = loop(1)
    with watch_training(model, first, on_error="raise") as watch:
        watch.log(next(losses))
        second = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        for _ in range(3):
            loss = model(**text_batch(seq_len=48)).loss
            loss.backward()
            second.step()
            second.zero_grad()
            watch.log(loss)
    assert not watch.reports


def test_weights_may_be_frozen_and_freed_in_a_loop() -> None:
    model, optimizer, losses = loop(4)
    factors = [p for n, p in model.named_parameters() if "lora_A" in n]
    for p in factors:
        p.requires_grad_(False)
    with watch_training(model, optimizer, on_error="raise") as watch:
        for step, loss in enumerate(losses):
            watch.log(loss)
            for p in factors:
                p.requires_grad_(step == 1)
    assert not [f for report in watch.reports for f in (*report.errors, *report.warnings)]


def test_a_warning_names_the_line_of_the_user(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoraHealthCallback(), poisoned(), max_steps=1, logging_nan_inf_filter=False)
    with pytest.warns(LoraHealthWarning) as told_in_a_run:
        run.train()
    with pytest.warns(LoraHealthWarning) as told_in_a_loop:
        fed("warn", [2.0, math.nan])
    told = [*told_in_a_run, *told_in_a_loop]
    own = {one.filename for one in told if issubclass(one.category, LoraHealthWarning)}
    assert own == {__file__}


def cut(model: Any, layers: range) -> Any:
    """No gradient gets past the attention output of these layers, as behind a forgotten ``detach()``."""
    for name, module in model.named_modules():
        if any(name.endswith(f"layers.{i}.self_attn") for i in layers):
            module.register_forward_hook(lambda _, __, out: (out[0].detach(), *out[1:]))
    return model


def on_attention(**changes: Any) -> torch.nn.Module:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    model = small()
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))


def everywhere(model: Any) -> range:
    return range(model.config.num_hidden_layers)


def with_adamw(model: Any, names: str) -> tuple[torch.optim.Optimizer, None]:
    """The optimizers of a Trainer that trains what has one of these names."""
    held = [p for n, p in model.named_parameters() if p.requires_grad and names in n]
    return torch.optim.AdamW(held, lr=2e-3), None


@pytest.mark.parametrize("logging_steps", [1, 3, 500])
def test_an_adapter_without_a_gradient_is_named(tmp_path: Path, logging_steps: int) -> None:
    model = on_attention(modules_to_save=["lm_head"])
    cut(model, everywhere(model))
    callback = LoraHealthCallback()
    run = trainer(tmp_path, callback, model, logging_steps=logging_steps, max_steps=4)
    with pytest.warns(LoraHealthWarning) as told:
        run.train()
    (error,) = (f for report in callback.watch.reports for f in report.errors if f.code == "LORA313")
    assert error.observed == "no gradient reaches the adapter at any step"
    assert sum("LORA313" in str(one.message) for one in told) == 1


def test_a_part_of_the_adapter_without_a_gradient_is_named(tmp_path: Path) -> None:
    callback = LoraHealthCallback()
    with pytest.warns(LoraHealthWarning):
        trainer(tmp_path, callback, cut(on_attention(), range(1)), max_steps=3).train()
    (warning,) = (f for report in callback.watch.reports for f in report.warnings if f.code == "LORA314")
    assert "layers.0.self_attn" in warning.where
    assert warning.observed == "no gradient reaches these adapters in 2 steps, while it reaches others"


def test_a_frozen_adapter_is_told_before_the_first_step(tmp_path: Path) -> None:
    model = adapted()
    model.requires_grad_(False)
    run = trainer(tmp_path, LoraHealthCallback(on_error="raise"), model)
    run.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with pytest.raises(LoraHealthError, match="all 14 LoRA layers are frozen"):
        run.train()
    assert run.state.global_step == 0


def test_an_optimizer_without_lora_b_is_told_before_the_first_step(tmp_path: Path) -> None:
    model = adapted()
    run = trainer(tmp_path, LoraHealthCallback(on_error="raise"), model)
    run.optimizer = with_adamw(model, "lora_A")[0]
    with pytest.raises(LoraHealthError, match="the optimizer misses lora_B, which are trainable"):
        run.train()
    assert run.state.global_step == 0


def test_an_optimizer_of_another_model_is_told_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoraHealthCallback(on_error="raise"))
    run.optimizer = with_adamw(adapted(), "lora")[0]
    with pytest.raises(LoraHealthError, match="LORA302"):
        run.train()


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup_steps": 10},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
        {"logging_steps": 500},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"max_steps": 1},
    ],
    ids=str,
)
def test_first_steps_of_healthy_runs_pass_in_silence(tmp_path: Path, changes: dict[str, Any]) -> None:
    callback = LoraHealthCallback(on_error="raise")
    trainer(tmp_path, callback, **{"max_steps": 3, **changes}).train()
    assert not any(report.errors or report.warnings for report in callback.watch.reports)


def test_a_learning_rate_that_is_too_high_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoraHealthCallback(), learning_rate=0.5, max_steps=3)
    with pytest.warns(LoraHealthWarning, match="LORA304"):
        run.train()


def test_the_callback_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    ends: list[tuple[list[float], list[torch.Tensor], torch.Tensor]] = []
    for watched in (True, False):
        torch.manual_seed(0)
        model: Any = on_attention(lora_dropout=0.2)
        callback = LoraHealthCallback()
        run = trainer(tmp_path, callback, model, max_steps=4)
        if not watched:
            run.remove_callback(callback)
        run.train()
        losses = [line["loss"] for line in run.state.log_history if "loss" in line]
        trained = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        ends.append((losses, trained, torch.get_rng_state()))
    (losses, trained, rng), (plain_losses, plain_trained, plain_rng) = ends
    assert losses == plain_losses
    assert all(map(torch.equal, trained, plain_trained))
    assert torch.equal(rng, plain_rng)


def test_a_loop_whose_adapter_gets_no_gradient_stops() -> None:
    model = on_attention(modules_to_save=["lm_head"])
    cut(model, everywhere(model)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    def train() -> None:
        with watch_training(model, optimizer, on_error="raise") as watch:
            for _ in range(5):
                loss = model(**text_batch(seq_len=48)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                logged.append(float(loss))
                watch.log(loss)

    logged: list[float] = []
    with pytest.raises(LoraHealthError, match="LORA313"):
        train()
    assert len(logged) == 2


def test_the_optimizer_of_a_loop_carries_no_hook_afterwards() -> None:
    model, optimizer, losses = loop(1)
    with watch_training(model, optimizer) as watch:
        for loss in losses:
            watch.log(loss)
    hooks: Any = vars(optimizer)
    assert not hooks["_optimizer_step_pre_hooks"]
    assert not hooks["_optimizer_step_post_hooks"]


def test_an_optimizer_that_takes_no_hooks_is_watched_all_the_same() -> None:
    """Wrappers such as Lookahead derive from ``Optimizer`` without calling its ``__init__``."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.param_groups, self.state, self.defaults = (
                inner,
                inner.param_groups,
                inner.state,
                {},
            )

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    model, optimizer, losses = loop(2)
    with watch_training(model, Wrapper(optimizer), on_error="raise") as watch:
        for loss in losses:
            watch.log(loss)
    assert watch.count == 2


def test_a_step_with_a_closure_is_not_looked_into() -> None:
    model, _, _ = loop()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(**text_batch(seq_len=48)).loss
        loss.backward()
        return float(loss)

    with watch_training(model, optimizer, on_error="raise") as watch:
        for _ in range(3):
            watch.log(optimizer.step(closure))
    assert not watch.reports


def byte_tokenizer() -> Any:
    """A tokenizer that knows the special tokens of the built-in base; its rows come tokenized."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sft_trainer(folder: Path, model: Any, callback: LoraHealthCallback, **arguments: Any) -> Any:
    """TRL's trainer with the defaults that it has for a GPU: bfloat16 and gradient checkpointing."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    config = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        learning_rate=2e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    rows = [{"input_ids": row["input_ids"].tolist()} for row in ROWS]
    return trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        callbacks=[callback],
        **arguments,
    )


def test_a_broken_run_of_sft_trainer_is_told(tmp_path: Path) -> None:
    model = on_attention(modules_to_save=["lm_head"])
    run = sft_trainer(tmp_path, cut(model, everywhere(model)), LoraHealthCallback())
    with pytest.warns(LoraHealthWarning, match="LORA313"):
        run.train()


def test_a_healthy_run_of_sft_trainer_passes_in_silence(tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="raise")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    sft_trainer(tmp_path, small(), callback, peft_config=config).train()
    assert callback.watch.count == 4
    assert not [f for report in callback.watch.reports for f in (*report.errors, *report.warnings)]


def test_the_schedule_of_a_run_reaches_its_history(tmp_path: Path) -> None:
    callback = LoraHealthCallback()
    trainer(tmp_path, callback, max_steps=12, warmup_steps=4).train()
    rates = callback.watch._rates
    assert len(rates) == 12
    assert rates.index(max(rates)) in (3, 4)
    flat = Watch(total_steps=600)
    for i in range(110):
        flat.log(2.0 + (37 * i * i % 101) / 1000, learning_rate=1e-5 * (i + 1))
    assert not [f for report in flat.reports for f in report.warnings], "it still warms up"


class Halt(TrainerCallback):
    """Ends a run that was planned for longer after its third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 3


@pytest.mark.parametrize(("rate", "told"), [(2e-4, True), (5e-6, False)])
def test_the_rate_of_a_run_of_dpo_trainer(tmp_path: Path, rate: float, told: bool) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    callback = LoraHealthCallback()
    config = trl.DPOConfig(
        output_dir=str(tmp_path),
        max_steps=100,
        learning_rate=rate,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    texts = [{"prompt": "<s>", "chosen": "<s> </s>", "rejected": "</s> <s>"}] * 8
    trainer = trl.DPOTrainer(
        model=small(),
        args=config,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback, Halt()],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    found = {f.code for report in callback.watch.reports for f in (*report.errors, *report.warnings)}
    assert found == ({"LORA371"} if told else set())
