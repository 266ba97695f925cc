"""The first rows of a Trainer's data: judged before the first step, without a trace in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments

from pytest_lora import Finding, LoraHealthCallback, LoraHealthWarning
from pytest_lora.bases.examples.models import llama_config
from pytest_lora.inspection.training import first_rows
from tests.runs.test_trl import dataset, llama, tokenizer

Row = dict[str, Any]
FEW = 4


def row(index: int, length: int = 12, **changes: Any) -> Row:
    ids = torch.randint(10, 90, (length,), generator=torch.Generator().manual_seed(index))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **changes}


def ignored(index: int) -> Row:
    return row(index, labels=torch.full((12,), -100))


class Rows(Dataset[Row]):
    """Rows read by index, which notes each that was."""

    def __init__(self, make: Callable[[int], Row] = row) -> None:
        self.make, self.read = make, list[int]()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Row:
        self.read.append(index)
        return self.make(index)


class Stream(IterableDataset[Row]):
    """Rows that come once."""

    def __init__(self) -> None:
        self.rows = iter([ignored(i) for i in range(64)])

    def __iter__(self) -> Iterator[Row]:
        return self.rows


def trainer(folder: Path, data: Any, callback: Any, kind: Any = LlamaForCausalLM, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    task = "SEQ_CLS" if kind is LlamaForSequenceClassification else "CAUSAL_LM"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=task)
    base = kind(llama_config(pad_token_id=0, **changes.pop("config", {})))
    fields = {"max_steps": FEW, "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(folder), learning_rate=1e-3, disable_tqdm=True, **fields)
    made = changes.pop("trainer", Trainer)
    callbacks = [callback] if callback else []
    return made(
        model=get_peft_model(base, config),
        args=arguments,
        train_dataset=data,
        callbacks=callbacks,
        **changes,
    )


def said(callback: LoraHealthCallback) -> list[Finding]:
    return [f for report in callback.watch.reports for f in (*report.errors, *report.warnings)]


def test_labels_that_are_all_ignored_are_told_before_the_first_step(tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="stop")
    run = trainer(tmp_path, Rows(ignored), callback)
    with pytest.warns(LoraHealthWarning, match="LORA320"):
        run.train()
    assert "LORA320" in {f.code for f in callback.watch.reports[0].errors}


def test_other_rules_on_batches(tmp_path: Path) -> None:
    classes = Rows(lambda i: row(i, labels=torch.tensor(i % 2)))
    one_output = {"num_labels": 1}
    callback = LoraHealthCallback()
    run = trainer(tmp_path, classes, callback, LlamaForSequenceClassification, config=one_output)
    with pytest.warns(LoraHealthWarning, match="LORA376"):
        run.train()


class Shifting(Trainer):
    """Makes its own loss of labels that are shifted already."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **other: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


def shifted(index: int) -> Row:
    ids = row(index)["input_ids"]
    return row(index, labels=torch.cat([ids[1:], torch.tensor([-100])]))


def test_whether_the_trainer_makes_its_own_loss(tmp_path: Path) -> None:
    callback = LoraHealthCallback()
    with pytest.warns(LoraHealthWarning, match="shifted"):
        trainer(tmp_path, Rows(shifted), callback).train()
    callback = LoraHealthCallback(on_error="raise")
    trainer(tmp_path, Rows(shifted), callback, trainer=Shifting).train()
    assert not said(callback)


def test_a_stream_is_not_read_and_that_is_said(tmp_path: Path) -> None:
    callback, data = LoraHealthCallback(select=["LORA1"], on_error="raise"), Stream()
    trainer(tmp_path, data, callback).train()
    [(why, _)] = callback.watch.not_judged  # once, though the model is looked at three times
    assert "may not be readable twice" in why
    assert not said(callback)


class Noisy:
    """A collator with random numbers of its own, of torch and of numpy, one of which it makes when it is called."""

    def __init__(self) -> None:
        self.own, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.later: torch.Generator | None = None

    def __call__(self, rows: list[Row]) -> Row:
        if self.later is None:
            self.later = torch.Generator().manual_seed(2)
        noise = torch.rand(1, generator=self.own) + self.numpy.random() + torch.rand(1, generator=self.later)
        batch = {name: torch.stack([r[name] for r in rows]) for name in rows[0]}
        place = int((noise + torch.rand(1) + np.random.rand()) * 1000) % batch["input_ids"].shape[1]
        batch["labels"][:, place] = -100
        return batch


def test_the_run_goes_as_it_would_without(tmp_path: Path) -> None:
    def losses(callback: Any) -> list[float]:
        run = trainer(tmp_path, Rows(), callback, data_collator=Noisy())
        np.random.seed(0)
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    assert losses(LoraHealthCallback()) == losses(None)


def test_a_loader_is_left_as_it_is() -> None:
    data = Rows()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    started = iter(loader)
    first = next(started)
    before = generator.get_state()
    data.read.clear()
    batches, why = first_rows(loader, 4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4]
    assert not why
    assert data.read == list(range(8)), "by index, in their order"
    assert torch.equal(before, generator.get_state())
    assert len([first, *started]) == 4, "the user's iterator goes on"


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ([{"labels": 1}], "may not be readable twice"),
        (DataLoader(Rows(lambda i: {"text": object()}), batch_size=2), "raised TypeError"),
    ],
    ids=["no loader", "rows that are not collated"],
)
def test_what_cannot_be_read_says_why(loader: Any, said: str) -> None:
    batches, why = first_rows(loader, 2)
    assert not batches
    assert said in why


class OfPrompts:
    """A collator that takes every token for a prompt."""

    def __call__(self, rows: list[Row]) -> Row:
        ids = torch.tensor([r["input_ids"] for r in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full_like(ids, -100),
        }


def test_rows_of_an_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    common = {"output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 1, "report_to": []}
    common |= {"save_strategy": "no", "use_cpu": True, "bf16": False, "learning_rate": 1e-4}
    run = trl.SFTTrainer(
        llama(),
        args=trl.SFTConfig(**common),
        train_dataset=dataset([{"input_ids": row(i)["input_ids"].tolist()} for i in range(16)]),
        processing_class=tokenizer(),
        data_collator=OfPrompts(),
        callbacks=[LoraHealthCallback(on_error="stop")],
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with pytest.warns(LoraHealthWarning, match="LORA320"):
        run.train()
