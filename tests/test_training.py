"""check_training and assert_loss_decreases: arguments, forms of batches, verdicts and messages."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora import (
    Expect,
    LoraHealthError,
    Report,
    assert_lora_healthy,
    assert_loss_decreases,
    check_loss_decreases,
    check_training,
)
from pytest_lora.bases.examples.models import BASES, classifier_batch, language_batch
from pytest_lora.facts.figures import LossCurve

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def adapted(base: str = "base", **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(BASES[base](), LoraConfig(**fields)).train()


def freeze(model: nn.Module, word: str) -> None:
    for name, parameter in model.named_parameters():
        if word in name:
            parameter.requires_grad_(False)


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 2.0}, TypeError, "steps must be a whole number"),
        ({"steps": True}, TypeError, "steps must be a whole number"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, not 'adam'"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be called with a model and a batch"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be a number at least 0"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number"),
        ({"history": 3.0}, TypeError, "history must be a sequence of losses"),
        ({"history": ["a"]}, TypeError, "history must hold numbers"),
        ({"base_snapshot": [1]}, TypeError, "base_snapshot must map names to tensors"),
        ({"base_snapshot": {"x": torch.ones(1)}}, ValueError, "base_snapshot: no name in it is in the model"),
        ({"scheduler": 1}, TypeError, "scheduler must be"),
        ({"scaler": 1}, TypeError, "scaler must be"),
        ({"expect": {}}, TypeError, "expect must be an Expect"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        check_training(adapted(), language_batch(), **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be a finite number at least 0, not -1.0"),
        ({"learning_rate": "1"}, TypeError, "learning_rate must be a number"),
        ({"by": math.nan}, ValueError, "by must be a finite number"),
        ({"device": "cuda:99"}, ValueError, "torch sees"),
        ({"device": "nonsense"}, ValueError, "device must be a torch device"),
        ({"device": 3}, TypeError, "device must be a torch device"),
    ],
)
def test_bad_arguments_of_the_assertion(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        assert_loss_decreases(adapted(), language_batch(), **arguments)


def test_a_rate_and_an_optimizer_exclude_each_other() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="learning_rate is for the optimizer that is made here"):
        assert_loss_decreases(
            model, language_batch(), learning_rate=1.0, optimizer=torch.optim.SGD(model.parameters(), 1.0)
        )


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], ValueError, "batches is empty"),
        (iter(()), ValueError, "batches is empty"),
        ("text", TypeError, "not 'text'"),
        (torch.ones(2, 2), TypeError, "not Tensor"),
        ([torch.ones(2, 2)], TypeError, "batches must hold dicts of tensors, not Tensor; give loss_fn"),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.long)},
            ValueError,
            "no scalar loss for a batch of input_ids",
        ),
        (7, TypeError, "not 7"),
    ],
)
def test_bad_batches_are_named(batches: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_training(adapted(), batches)


def test_a_loss_that_is_no_scalar_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"loss_fn must return a scalar tensor, not a tensor of shape \(4, 16"
    ):
        check_training(adapted(), language_batch(), loss_fn=lambda m, b: m(**b).logits)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(TypeError, match="must carry LoRA layers"):
        check_training(BASES["base"](), language_batch())


# --- forms of batches


def one_by_one() -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield language_batch()


@pytest.mark.parametrize(
    "batches",
    [
        language_batch(),
        [language_batch(), language_batch()],
        one_by_one(),
        torch.utils.data.DataLoader([{k: v[0] for k, v in language_batch().items()}] * 8, batch_size=2),
    ],
    ids=["dict", "list", "endless generator", "DataLoader"],
)
def test_forms_of_batches(batches: Any) -> None:
    assert not check_training(adapted(), batches).findings
    assert len(curve_of(assert_loss_decreases(adapted(), batches, steps=4, by=0.0)).losses) == 4


def test_batches_of_another_form_with_a_loss_function() -> None:
    def loss(model: Any, pair: Any) -> torch.Tensor:
        ids, labels = pair
        found: torch.Tensor = model(input_ids=ids, labels=labels).loss
        return found

    ids = language_batch()["input_ids"]
    for batches in ((ids, ids), [(ids, ids)] * 2):
        assert not check_training(adapted(), batches, loss_fn=loss).findings


def curve_of(report: Report) -> LossCurve:
    (curve,) = (figure for figure in report.figures if isinstance(figure, LossCurve))
    return curve


# --- verdicts


@pytest.mark.parametrize("base", ["base", "base_4bit"])
def test_a_healthy_adapter_lowers_the_loss(base: str) -> None:
    report = assert_loss_decreases(adapted(base), language_batch())
    curve = curve_of(report)
    assert report.measure("loss drop within 20 steps") == curve.drop
    assert curve.drop is not None
    assert curve.drop > 0.05
    assert len(curve.losses) == 20
    assert curve.before == pytest.approx(curve.losses[0], rel=1e-3)
    with pytest.raises(KeyError, match="there are loss drop within 20 steps"):
        report.measure("loss")


def test_the_verdict_is_the_same_each_time() -> None:
    model, batch = adapted(lora_dropout=0.1), language_batch()
    assert assert_loss_decreases(model, batch) == assert_loss_decreases(model, batch)


def test_too_small_a_drop_says_the_curve() -> None:
    with pytest.raises(LoraHealthError) as raised:
        assert_loss_decreases(adapted(), language_batch(), steps=4, by=0.9)
    message = str(raised.value)
    assert "LORA316" in message
    assert "a drop of 90 % at least" in message
    assert "step by step 4.8" in message
    assert {f.code for f in raised.value.report.errors} == {"LORA316"}


def broken(form: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A classifier, whose head could lower the loss alone, in a broken form."""
    alpha = 0 if form == "alpha 0" else 16
    model = adapted("classifier_base", task_type="SEQ_CLS", lora_alpha=alpha)
    batch, arguments = classifier_batch(), dict[str, Any]()
    if form == "frozen adapter":
        freeze(model, "lora_")
    elif form == "B frozen":
        freeze(model, "lora_B")
    elif form == "stale optimizer":
        other = adapted("classifier_base", task_type="SEQ_CLS")
        arguments["optimizer"] = torch.optim.AdamW(
            [p for p in other.parameters() if p.requires_grad], lr=1e-2
        )
    elif form == "lr 0":
        arguments["learning_rate"] = 0.0
    elif form == "labels all -100":
        batch["labels"].fill_(-100)
    elif form == "detached graph":
        arguments["loss_fn"] = lambda m, b: m(**b).loss.detach()
    return model, batch, arguments


@pytest.mark.parametrize(
    ("form", "code", "words"),
    [
        ("frozen adapter", "LORA313", "frozen"),
        ("stale optimizer", "LORA302", "stale"),
        ("lr 0", "LORA303", "learning rate is 0"),
        ("labels all -100", "LORA320", "all labels are -100"),
        ("detached graph", "LORA312", "no graph"),
        ("B frozen", "LORA313", "lora_B is zero and frozen"),
        ("alpha 0", "LORA313", "scaling is 0"),
    ],
)
def test_broken_forms_fail_with_their_reason(form: str, code: str, words: str) -> None:
    model, batch, arguments = broken(form)
    with pytest.raises(LoraHealthError) as raised:
        assert_loss_decreases(model, batch, **arguments)
    found = {f.code for f in raised.value.report.errors}
    assert found == {"LORA316", code}
    assert words in str(raised.value)


def test_a_head_that_learns_alone_does_not_pass() -> None:
    model, batch, _ = broken("B frozen")
    report = check_loss_decreases(model, batch)
    assert "something else lowered it" in str(report)


def test_a_base_that_knows_the_data_passes() -> None:
    model, batch = adapted(), language_batch()
    base = model.get_base_model()
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        base(**batch).loss.backward()
        optimizer.step()
    fitted = get_peft_model(model.merge_and_unload(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    before = curve_of(assert_loss_decreases(fitted.train(), batch)).before
    assert before is not None
    assert before < 0.1


def test_gradients_of_fresh_a_arrive_with_the_second_step() -> None:
    from pytest_lora.inspection.training import Plan, training_facts

    facts = training_facts(adapted(), language_batch(), Plan(steps=2, rate=1e-3))
    for tensor in facts.adapter_tensors:
        first, second = tensor.gradients
        assert (first == 0) == (tensor.part == "a")
        assert second


# --- assert_lora_healthy


def test_assert_lora_healthy_with_a_batch_also_trains() -> None:
    model = adapted(lora_dropout=0.1)
    assert not assert_lora_healthy(model, batches=language_batch(), steps=2).errors
    batch = language_batch()
    batch["labels"].fill_(-100)
    assert not assert_lora_healthy(model).errors
    with pytest.raises(LoraHealthError, match="LORA320"):
        assert_lora_healthy(model, batches=batch)
    assert not assert_lora_healthy(model, batches=batch, ignore=["LORA320"]).errors


def test_assert_lora_healthy_hears_of_the_optimizer_once() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(BASES["base"]().parameters(), lr=1e-3)
    with pytest.raises(LoraHealthError) as raised:
        assert_lora_healthy(model, batches=language_batch(), optimizer=optimizer)
    assert [f.code for f in raised.value.report.errors].count("LORA302") == 1


def test_steps_need_a_batch() -> None:
    with pytest.raises(ValueError, match="steps needs batches"):
        assert_lora_healthy(adapted(), steps=3)


def test_a_model_for_evaluation_is_not_trained() -> None:
    def never(model: Any, batch: Any) -> torch.Tensor:
        raise AssertionError("a step was taken")

    assert not check_training(
        adapted(), language_batch(), loss_fn=never, expect=Expect(purpose="eval")
    ).findings


def test_a_step_that_raises_is_a_finding_and_leaves_no_trace() -> None:
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = check_training(model, {**language_batch(), "labels": language_batch()["labels"].float()})
    assert [(f.code, f.where) for f in report.errors] == [("LORA319", "step 1, batch 0, forward pass")]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_made_for_inference_is_told_and_stays_what_it_was() -> None:
    with torch.inference_mode():
        model = adapted()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    report = check_training(model, language_batch())
    assert [f.fix for f in report.errors] == [
        "build the model outside of inference mode (torch.inference_mode)"
    ]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_an_error_that_says_nothing_of_the_set_up_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a mistake in the model's own code")

    monkeypatch.setattr(model.get_base_model(), "forward", broken)
    with pytest.raises(RuntimeError, match="a mistake in the model's own code"):
        check_training(model, language_batch())


def test_what_the_users_own_loss_raises_goes_on() -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        raise LookupError("a mistake of the user")

    with pytest.raises(LookupError, match="a mistake of the user"):
        check_training(adapted(), language_batch(), loss_fn=loss)


def test_a_step_that_raises_does_so_in_the_assertion_on_the_loss() -> None:
    batch = language_batch()
    batch["labels"] = batch["labels"].float()
    with pytest.raises(RuntimeError):
        assert_loss_decreases(adapted(), batch)
