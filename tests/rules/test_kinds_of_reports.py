"""Faults of public reports: classes taken for numbers, values that a format loses, rates that end or move nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    get_constant_schedule,
    get_linear_schedule_with_warmup,
)

from pytest_lora import (
    Expect,
    Report,
    check_checkpoint,
    check_config,
    check_merge,
    check_model,
    check_training,
)
from pytest_lora.bases import examples
from pytest_lora.bases.examples.models import WIDTH, llama_config
from pytest_lora.inspection.training import FirstSteps
from pytest_lora.rules import judge

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def severities(report: Report) -> dict[str, str]:
    return {finding.code: finding.severity for finding in report.findings}


def adapted(base: nn.Module, **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, **changes}
    return get_peft_model(base, LoraConfig(**fields)).train()


# ------------------------------------------------------------------------------- one output


def judged_labels(labels: Tensor, num_labels: int = 1, **config: Any) -> dict[str, str]:
    base = LlamaForSequenceClassification(llama_config(num_labels=num_labels, pad_token_id=0, **config))
    batch = {**examples.batch, "labels": labels}
    return severities(check_training(adapted(base, task_type="SEQ_CLS"), batch))


def test_classes_of_a_model_with_one_output() -> None:
    classes = torch.tensor([0, 1, 1, 0])
    assert judged_labels(classes) == {"LORA376": "warning"}
    assert judged_labels(classes.bool()) == {"LORA376": "warning"}
    assert judged_labels(torch.tensor([1, 5, 3, 2])) == {"LORA376": "info"}, "stars may be numbers"


def test_labels_that_say_what_they_are() -> None:
    classes = torch.tensor([0, 1, 1, 0])
    assert not judged_labels(classes, num_labels=2), "an output a class, as advised"
    assert not judged_labels(classes.float()), "floats, as advised"
    assert not judged_labels(classes, problem_type="regression"), "numbers, in so many words"


# ------------------------------------------------------------------------------- heads of one's own


class Reward(nn.Module):
    """A reward model as people write it: a body, and a layer that makes one number of its last state."""

    def __init__(self, outputs: int = 1, name: str = "v_head") -> None:
        super().__init__()
        self.config = llama_config()
        self.model = LlamaModel(self.config)
        self.add_module(name, nn.Linear(WIDTH, outputs, bias=False))
        self.head = name

    def forward(self, input_ids: Tensor, **other: Any) -> Tensor:
        states = self.model(input_ids=input_ids).last_hidden_state
        scores: Tensor = self.get_submodule(self.head)(states[:, -1])
        return scores


@pytest.mark.parametrize("name", ["v_head", "score"])
def test_the_head_of_a_reward_model_that_stays_frozen(name: str) -> None:
    model = adapted(Reward(name=name))
    assert severities(check_model(model)) == {"LORA112": "warning"}
    assert not check_model(adapted(Reward(name=name), modules_to_save=[name])).findings


def test_heads_that_are_trained_or_none() -> None:
    by_hand = adapted(Reward())
    by_hand.base_model.model.v_head.requires_grad_(True)
    assert "LORA112" not in severities(check_model(by_hand)), "set to train by hand"
    before = Reward()
    with torch.no_grad():
        before.v_head.weight.add_(0.05 * torch.randn(1, WIDTH))
    assert not check_model(adapted(before)).findings, "trained before"
    assert not check_model(adapted(Reward(outputs=8))).findings, "no head of one number"
    assert not check_model(adapted(Reward(name="extra"))).findings, "no name of a head"


# ------------------------------------------------------------------------------- float16 files


def saved(change: Any) -> dict[str, str]:
    path: Path = examples.adapter()
    examples.edit(path, lambda tensors: {k: change(v) if "lora_B" in k else v for k, v in tensors.items()})
    return severities(check_checkpoint(path))


def of_size(size: float, tensor: Tensor) -> Tensor:
    return tensor * (size / tensor.std())


def test_values_that_float16_does_not_hold() -> None:
    assert saved(lambda t: of_size(1e-7, t).half()) == {"LORA446": "warning"}


def test_files_that_hold_what_was_trained() -> None:
    assert not saved(lambda t: of_size(1e-7, t).bfloat16()), "as advised"
    assert not saved(lambda t: of_size(1e-7, t)), "as advised"
    assert not saved(lambda t: of_size(1e-3, t).half()), "as most are"
    assert not saved(lambda t: of_size(1e-5, t).half()), "few digits, and no zeros"
    pruned = saved(lambda t: (of_size(1e-2, t) * (torch.rand_like(t) < 0.3)).half())
    assert "LORA446" not in pruned, "zeros beside numbers of any size"


# ------------------------------------------------------------------------------- merges


def merge_of(size: float, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Report:
    model = adapted(LlamaForCausalLM(llama_config()).to(dtype), init_lora_weights=False, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(size)
    return check_merge(model, examples.batch)


def merged(size: float, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, str]:
    return severities(merge_of(size, dtype, **changes))


def test_a_merge_that_rounds_the_update_away() -> None:
    assert merged(1e-4) == {"LORA926": "warning"}
    (found,) = merge_of(1e-4).findings
    assert 50 < int(found.observed.partition("%")[0]) <= 100


def test_merges_that_keep_it() -> None:
    assert not merged(1e-4, torch.float32), "as advised"
    assert not merged(1e-1), "an update that bfloat16 holds"
    assert not merged(1e-4, use_dora=True), "DoRA writes every number anew"
    assert not merged(0.0), "no update"


# ------------------------------------------------------------------------------- rates


def first_steps(
    schedule: Callable[[Any], Any], total: int | None, lr: float = 1e-3, loss: float = 5.0
) -> dict[str, str]:
    """What is said of three steps of a run that is to take so many."""
    model = adapted(examples.base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    scheduler = schedule(optimizer)
    torch.autograd.backward(model(**examples.batch).loss)
    seen = FirstSteps(model, optimizer, scheduler, False, "texts", total)
    for _ in range(3):
        seen.before_step()
        optimizer.step()
        seen.after_step()
        scheduler.step()
    return {finding.code: finding.severity for finding in judge([seen.facts([loss] * 3)], Expect())}


def linear(steps: int) -> Callable[[Any], Any]:
    return partial(get_linear_schedule_with_warmup, num_warmup_steps=0, num_training_steps=steps)


def test_a_schedule_that_ends_before_the_run() -> None:
    assert first_steps(linear(50), 100) == {"LORA303": "warning"}
    assert first_steps(linear(700), 1000) == {"LORA303": "warning"}
    assert not first_steps(linear(100), 100), "as advised"
    assert not first_steps(linear(50), 55), "a cool-down"
    assert not first_steps(linear(50), None), "a run of unknown length"
    assert not first_steps(get_constant_schedule, 100), "no end"


def test_a_rate_that_moves_nothing_in_few_steps() -> None:
    assert first_steps(linear(20), 20, 1e-6) == {"LORA370": "warning"}
    assert first_steps(get_constant_schedule, 63, 1e-6) == {"LORA370": "warning"}, "the run says its steps"
    assert not first_steps(linear(20), 20, 2e-4), "as advised"
    assert not first_steps(linear(20), 20, 2e-5), "a recipe for thousands of steps tried out"
    assert not first_steps(get_constant_schedule, 20_000, 1e-6), "so many steps get somewhere"


# ------------------------------------------------------------------------------- two towers


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seeing, self.reading = (nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.reading["q_proj"](self.seeing["q_proj"](x))


def test_a_tower_that_only_the_saved_targets_reach(tmp_path: Path) -> None:
    model = adapted(TwoTowers(), target_modules=r"reading\.q_proj", init_lora_weights=False)
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    known = {
        **json.loads(config.read_text()),
        "base_model_name_or_path": "org/base",
        "target_modules": ["q_proj"],
    }
    config.write_text(json.dumps(known))
    (found,) = (f for f in check_checkpoint(tmp_path, TwoTowers()).findings if f.code == "LORA424")
    pattern = found.fix.partition('"exclude_modules": ')[2].partition(" in adapter_config.json")[0]
    config.write_text(json.dumps({**known, "exclude_modules": json.loads(pattern)}))
    assert "LORA424" not in severities(check_checkpoint(tmp_path, TwoTowers()))


# ------------------------------------------------------------------------------- tying


@pytest.mark.skipif(
    "ensure_weight_tying" not in LoraConfig.__dataclass_fields__, reason="this PEFT does not tie adapters"
)
@pytest.mark.parametrize(
    ("fields", "tied", "told"),
    [
        ({"trainable_token_indices": {"embed_tokens": [1]}}, False, True),
        ({"modules_to_save": ["embed_tokens"]}, False, True),
        ({"target_modules": [*TARGETS, "embed_tokens"]}, False, True),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}}, False, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False, False),
        ({"target_modules": [*TARGETS, "lm_head"]}, False, False),
        ({}, False, False),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, True, False),
        ({"trainable_token_indices": {"embed_tokens": [1]}, "ensure_weight_tying": False}, False, False),
    ],
)
def test_tying_that_is_asked_of_an_untied_base(fields: dict[str, Any], tied: bool, told: bool) -> None:
    config = LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "ensure_weight_tying": True, **fields}
    )
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=tied))
    assert ("LORA134" in severities(check_config(config, base))) is told
