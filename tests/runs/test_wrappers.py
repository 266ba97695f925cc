"""The callback finds the wrapper that the Trainer does not show to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from pytest_lora import LoraHealthCallback, run_distributed
from pytest_lora.bases.examples.models import made
from tests.forked import fork_ranks

IDS = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))


def adapted() -> Any:
    return get_peft_model(made("base"), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def told(call: Callable[..., Any], *given: Any, **named: Any) -> list[str]:
    """The codes of what is warned of in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*given, **named)
    codes = (str(warning.message).partition("[")[2].partition("]")[0] for warning in caught)
    return [code for code in codes if code.startswith("LORA")]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one process."""
    group: Any = dist
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def calls(callback: LoraHealthCallback, model: Any, forward: Callable[..., Any], tmp_path: Path) -> list[str]:
    """What a callback says, and when, in the order in which a Trainer calls it."""
    args, state, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    said = []
    for name in ("on_train_begin", "forward", "on_step_end", "on_step_end", "on_train_end"):
        if name == "forward":
            codes = told(forward, input_ids=IDS, labels=IDS)
        else:
            codes = told(getattr(callback, name), args, state, control, model=model)
        state.global_step += name == "on_step_end"
        said += [f"{name}: {code}" for code in codes]
    return said


@pytest.mark.usefixtures("alone")
def test_the_wrapper_is_judged_when_it_first_calls_the_model_and_the_model_alone_as_ever(
    tmp_path: Path,
) -> None:
    model = adapted()
    model.add_adapter("second", model.peft_config["default"])
    wrapped = DistributedDataParallel(model)
    model.set_adapter("second")
    before = len(model._forward_pre_hooks)
    assert calls(LoraHealthCallback(select=["LORA249"]), model, wrapped, tmp_path) == ["forward: LORA249"]
    assert len(model._forward_pre_hooks) == before
    assert calls(LoraHealthCallback(select=["LORA249"]), model, model, tmp_path) == []


@pytest.mark.usefixtures("alone")
def test_a_run_that_never_calls_the_model_leaves_no_hook(tmp_path: Path) -> None:
    model = adapted()
    before = len(model._forward_pre_hooks)
    calls(LoraHealthCallback(), model, lambda **_: None, tmp_path)
    assert len(model._forward_pre_hooks) == before


def trains_what_torch_refuses(folder: str) -> list[str]:
    """A rank of a run that looks for unused weights while a reentrant checkpoint goes backward twice."""
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    args = TrainingArguments(
        folder, use_cpu=True, max_steps=2, per_device_train_batch_size=1, save_strategy="no", report_to=[],
        disable_tqdm=True, ddp_find_unused_parameters=True, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    trainer = Trainer(adapted(), args, train_dataset=rows, callbacks=[LoraHealthCallback(select=["LORA251"])])

    def train() -> None:
        with suppress(RuntimeError):
            trainer.train()

    return told(train)


@pytest.mark.lora_slow
def test_a_trainer_of_two_ranks_is_told_of_its_wrapper_before_torch_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_ranks(monkeypatch)
    assert run_distributed(trains_what_torch_refuses, args=[str(tmp_path)])[0] == ["LORA251"]
