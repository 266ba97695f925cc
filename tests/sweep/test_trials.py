"""Trials: fresh each time, reproducible, leaving no trace; and a row with a diagnosis for whatever goes wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from pytest_lora import SweepResult, rank_sweep
from pytest_lora.bases.tiny import load_tiny, text_batch
from pytest_lora.sweep import TrainOn, TrialPlan
from tests.sweep import toys


def sweep(
    make_model: Any = toys.make_model, train: Any = toys.train, evaluate: Any = toys.evaluate, **settings: Any
) -> SweepResult:
    return rank_sweep(
        make_model, train, evaluate, **{"ranks": (2,), "config": toys.CONFIG, "progress": False} | settings
    )


def failure_of(**settings: Any) -> tuple[str, str, str]:
    (row,) = sweep(**settings).failed
    assert row.failure is not None
    assert row.metric is None
    return row.failure.kind, row.failure.message, row.failure.advice


def test_a_sweep_measures_everything() -> None:
    result = sweep(ranks=(4, 2), seeds=2, fraction=0.5, metric="fit", data="toys")
    assert [(row.rank, row.alpha, row.seed) for row in result.trials] == [
        (2, 4, 0),
        (2, 4, 1),
        (4, 8, 0),
        (4, 8, 1),
    ]
    for row in result.trials:
        assert row.failure is None
        assert row.metric is not None
        assert result.before is not None
        assert row.metric > result.before
        assert len(row.losses) == 10
        assert len(set(row.losses)) == 10
        assert row.trainable == row.rank * (8 + 16 + 16 + 4)
        assert row.data == "10 of 20"
        assert row.device == "cpu"
        assert row.seconds is not None
        assert row.peak_bytes is None
        assert row.memory == "not estimated: the model has no configuration, or its batch no input_ids"
    assert result.before == toys.evaluate(toys.make_model())
    assert result.settings["fraction"] == "0.5"
    assert result.settings["data"] == "toys"
    assert result.versions["torch"] == version("torch")
    assert SweepResult.from_json(result.to_json()) == result


def test_operations_are_those_of_all_steps() -> None:
    """Linear layers of 8 x 16 and 16 x 4 with rank r on batches of 5, 10 steps; no gradient goes into the data."""
    (row,) = sweep(fraction=0.5).trials

    def layer(n: int, m: int, to_input: bool) -> int:
        forward = n * m + 2 * (n + m)  # base, A and B, of rank 2
        adapter = 2 * n + 2 * m  # gradients of A and B
        back = 2 * m + (n * m + 2 * n if to_input else 0)  # into A's output, and through base and A
        return 2 * 5 * (forward + adapter + back)

    assert row.flops == 10 * (layer(8, 16, False) + layer(16, 4, True))


def test_every_trial_starts_fresh_with_its_seed_set_before_the_adapter_is_made() -> None:
    seen: list[tuple[int, int, bytes, bytes]] = []

    def train(model: nn.Module, plan: TrialPlan) -> None:
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        (a,) = (p for n, p in state.items() if "0.lora_A" in n)
        assert all(not p.any() for n, p in state.items() if "lora_B" in n)
        base = state["base_model.model.0.base_layer.weight"]
        seen.append((plan.rank, plan.seed, a.numpy().tobytes(), base.numpy().tobytes()))
        toys.train(model, plan)

    def make_model() -> nn.Module:
        torch.rand(random.randrange(100))  # however much randomness the base takes
        return toys.make_model()

    sweep(make_model, train, ranks=(2, 4), seeds=2)
    sweep(make_model, train, ranks=(4, 2), seeds=2)
    assert len(seen) == 8
    assert len({base for *_, base in seen}) == 1
    assert len({(rank, seed, a) for rank, seed, a, _ in seen}) == 4
    assert len({a for _, _, a, _ in seen}) == 4


def test_ranks_of_one_seed_get_the_same_slice() -> None:
    drawn: dict[tuple[int, int], list[int]] = {}

    def train(model: nn.Module, plan: TrialPlan) -> None:
        drawn[plan.rank, plan.seed] = plan.share(range(95))

    sweep(train=train, ranks=(2, 4), seeds=2, fraction=0.1)
    assert drawn[2, 0] == drawn[4, 0] != drawn[2, 1] == drawn[4, 1]
    assert len(drawn[2, 0]) == len(set(drawn[2, 0])) == 10


def test_random_states_are_as_before() -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    sweep(ranks=(2, 4))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_no_hook_is_left_and_modes_are_set() -> None:
    models: list[nn.Module] = []

    def train(model: nn.Module, plan: TrialPlan) -> None:
        assert model.training
        models.append(model)

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        assert not any(m._forward_pre_hooks for m in model.modules())
        return 1.0

    sweep(train=train, evaluate=evaluate)
    assert len(models) == 1
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    from torch.optim.optimizer import _global_optimizer_post_hooks

    assert not _global_optimizer_post_hooks, optimizer


def oom(model: nn.Module, plan: TrialPlan) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def not_finite(model: nn.Module, plan: TrialPlan) -> list[float]:
    return [1.0, math.nan, math.nan]


def broken(model: nn.Module, plan: TrialPlan) -> None:
    raise KeyError("missing")


def words(model: nn.Module, plan: TrialPlan) -> list[str]:
    return ["low"]


@pytest.mark.parametrize(
    ("settings", "kind", "message", "advice"),
    [
        (
            {"train": oom},
            "out of memory",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.",
            "lower the batch size: rank hardly changes the peak",
        ),
        ({"train": not_finite}, "diverged", "loss 2 of 3 is nan", "lower the learning rate, or warm it up"),
        (
            {"evaluate": lambda model: math.nan},
            "diverged",
            "metric is nan after training",
            "lower the learning rate, or warm it up",
        ),
        (
            {"evaluate": lambda model: None},
            "no metric",
            "evaluate returned NoneType None, no number",
            "return a number, or name the entry with metric=",
        ),
        (
            {"evaluate": lambda model: {"eval_loss": 1.0}, "metric": "accuracy"},
            "no metric",
            "evaluate returned a mapping without 'accuracy', with 'eval_loss'",
            "return a number, or name the entry with metric=",
        ),
    ],
)
def test_what_goes_wrong_is_a_diagnosed_row(
    settings: dict[str, Any], kind: str, message: str, advice: str
) -> None:
    assert failure_of(**settings) == (kind, message, advice)


@pytest.mark.parametrize(
    ("settings", "starts", "ends"),
    [
        (
            {"train": broken},
            "KeyError: 'missing' (",
            f"test_trials.py:{broken.__code__.co_firstlineno + 1} in broken)",
        ),
        (
            {"train": words},
            "TypeError: train must return its losses, a list of numbers, or None; not list ['low']",
            ")",
        ),
        (
            {"make_model": lambda: None},
            "TypeError: make_model must return a torch.nn.Module, not NoneType",
            ")",
        ),
        (
            {"config": {"target_modules": ["q_proj"]}},
            "NoMatchingPeftModuleError: Target modules {'q_proj'} not found",
            ")",
        ),
    ],
)
def test_errors_say_what_and_where(settings: dict[str, Any], starts: str, ends: str) -> None:
    kind, message, _ = failure_of(**settings)
    assert kind == "error"
    assert message.replace("ValueError: Target", "NoMatchingPeftModuleError: Target").startswith(
        starts
    )  # older PEFT
    assert message.endswith(ends)


def test_a_base_that_is_not_fresh_is_told() -> None:
    base = toys.make_model()
    result = sweep(lambda: base, ranks=(2, 4))
    message = "make_model must return a fresh base in every call, without adapter; this Sequential carries one already"
    assert all(message in str(row.failure) for row in result.failed)
    assert len(result.failed) == 2


def test_other_trials_go_on_and_health_is_noted() -> None:
    def train(model: nn.Module, plan: TrialPlan) -> list[float] | None:
        if plan.rank == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return toys.train(model, plan) if plan.rank == 4 else None

    result = sweep(train=train, ranks=(2, 4, 8), fraction=1.0)
    assert [row.failure and row.failure.kind for row in result.trials] == ["out of memory", None, None]
    untrained = result.trials[2]
    assert "LORA225" in [finding.code for finding in untrained.findings]
    assert "LORA225 adapter holds no update at r=8" in result.table()
    assert "r=2, seed 0: out of memory: RuntimeError: DefaultCPUAllocator" in result.table()
    assert result.choose().rank == 4


def test_metric_of_a_mapping_and_of_a_tensor() -> None:
    result = sweep(evaluate=lambda model: {"loss": torch.tensor(0.5)}, metric="loss", maximise=False)
    assert result.trials[0].metric == 0.5


def keep(model: nn.Module, plan: TrialPlan) -> None:
    pytest.fail("a trial has started")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ranks": ()}, ValueError, "ranks must not be empty"),
        ({"ranks": (4, 8, 4)}, ValueError, "ranks must differ, but 4 is there twice"),
        ({"ranks": (0, 4)}, ValueError, "ranks must be at least 1, not 0"),
        ({"ranks": (4, 8.0)}, TypeError, "ranks must be a whole number, not 8.0"),
        ({"ranks": 8}, TypeError, r"ranks must be whole numbers such as \(4, 8, 16\), not 8"),
        ({"ranks": "4,8"}, TypeError, r"ranks must be whole numbers such as \(4, 8, 16\), not '4,8'"),
        ({"alpha_ratio": 0}, ValueError, "alpha_ratio must be a finite number above 0 .*, not 0"),
        ({"fraction": 1.5}, ValueError, "fraction must be a finite number above 0 and at most 1, not 1.5"),
        (
            {"fraction": math.nan},
            ValueError,
            "fraction must be a finite number above 0 and at most 1, not nan",
        ),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, not 0"),
        ({"seeds": 0}, ValueError, "seeds must be at least 1, not 0"),
        ({"seeds": [1, 1]}, ValueError, "seeds must differ, but 1 is there twice"),
        ({"executor": 2}, TypeError, "executor must be a concurrent.futures.Executor, not int"),
        ({"config": {"r": 8}}, ValueError, "config: r is what ranks is for; leave it out"),
        (
            {"config": {"lora_alpha": 8}},
            ValueError,
            "config: lora_alpha is what alpha_ratio is for; leave it out",
        ),
        ({"config": {"rang": 8}}, TypeError, "config: peft refuses it: .*rang"),
        ({"config": LoraConfig(rank_pattern={"0": 2})}, ValueError, "config: rank_pattern fixes values"),
        (
            {"train": [{}]},
            TypeError,
            r"train must be a function, not list; for a list of batches: TrainOn\(batches",
        ),
        ({"evaluate": None}, TypeError, "evaluate must be a function, not NoneType"),
        ({"make_model": nn.Module}, TypeError, "make_model must be a function, not type"),
        ({"metric": None}, TypeError, "metric must be text, not None"),
        ({"maximise": "yes"}, TypeError, "maximise must be True or False, not 'yes'"),
        ({"progress": 1}, TypeError, "progress must be True or False, not 1"),
    ],
)
def test_bad_arguments_raise_before_any_trial(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        sweep(**{"train": keep, "journal": tmp_path / "j"} | settings)
    assert not (tmp_path / "j").exists()


# --------------------------------------------------------------------------------------------------- journal


def test_a_journal_is_widened_by_more_ranks_and_seeds(tmp_path: Path) -> None:
    train = toys.noting(tmp_path)
    first = sweep(train=train, ranks=(2, 4), journal=tmp_path / "j")
    more = sweep(train=train, ranks=(1, 2, 4), seeds=2, journal=tmp_path / "j")
    assert toys.starts(tmp_path) == ["1 0", "1 1", "2 0", "2 1", "4 0", "4 1"]
    assert [row for row in more.trials if row.rank > 1 and row.seed == 0] == list(first.trials)
    assert more.before == first.before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fraction": 0.2}, "fraction was 0.1 and is now 0.2"),
        (
            {"config": {"target_modules": ["0"]}},
            r"config was target_modules=\['0', '2'\] and is now target_modules=\['0'\]",
        ),
        (
            {"train": lambda model, plan: None},
            r"train was train@\w+ and is now <lambda>@\w+; train.data was data@\w+ and is now not set",
        ),
    ],
)
def test_a_journal_of_another_sweep_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    sweep(journal=tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(
        ValueError, match=rf"^journal: .*j is of another sweep: {message}.*\. Name another file, or del"
    ):
        sweep(**{"train": toys.train, "journal": tmp_path / "j"} | changed)
    assert (tmp_path / "j").read_bytes() == before


@pytest.mark.parametrize("text", ["hello", "hello\nworld\n", '{"rank": 2}\n', "[]\n"])
def test_a_file_that_is_no_journal_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "j").write_text(text)
    with pytest.raises(ValueError, match=r"^journal: .* is no journal of a rank sweep; name another file"):
        sweep(train=keep, journal=tmp_path / "j")
    assert (tmp_path / "j").read_text() == text


def test_failures_are_kept_but_errors_are_tried_again(tmp_path: Path) -> None:
    def train(model: nn.Module, plan: TrialPlan) -> list[float] | None:
        toys.train_and_note(str(tmp_path), model, plan)
        if plan.rank == 2:
            return [math.nan]
        if toys.starts(tmp_path).count("4 0") == 1:
            raise OSError("the disk was away")
        return None

    first = sweep(train=train, ranks=(2, 4), journal=tmp_path / "j")
    assert [row.failure and row.failure.kind for row in first.trials] == ["diverged", "error"]
    second = sweep(train=train, ranks=(2, 4), journal=tmp_path / "j")
    assert [row.failure and row.failure.kind for row in second.trials] == ["diverged", None]
    assert toys.starts(tmp_path) == ["2 0", "4 0", "4 0"]
    assert math.isnan(second.trials[0].losses[0])
    assert json.loads((tmp_path / "j").read_text().splitlines()[2])["trial"]["losses"] == ["nan"]


# ---------------------------------------------------------------------------------------- a language model


def loss(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"loss": model(**text_batch()).loss}


def test_the_built_in_base_in_four_bits_with_the_plain_loop() -> None:
    batches = [text_batch(batch_size=2, seq_len=32)] * 8
    result = rank_sweep(
        load_tiny,
        TrainOn(batches, lr=3e-3),
        loss,
        ranks=(2,),
        fraction=0.5,
        epochs=2,
        metric="loss",
        maximise=False,
        progress=False,
    )
    (row,) = result.trials
    assert row.failure is None
    assert row.metric is not None
    assert result.before is not None
    assert row.metric < result.before
    assert len(row.losses) == 8
    assert row.memory == "estimated"
    assert row.peak_bytes is not None
    assert row.peak_bytes > 10**6
    assert row.trainable == 24_320
    assert not [finding for finding in row.findings if finding.severity == "error"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TrainOn({}), TypeError, "batches must be a list of batches, not dict"),
        (lambda: TrainOn([]), ValueError, "batches must not be empty"),
        (lambda: TrainOn([1], lr=0), ValueError, "lr must be above 0, not 0"),
        (lambda: TrialPlan(2, 4, 0).share([]), ValueError, "items must not be empty"),
        (lambda: TrialPlan(2, 4, 0).share(iter([1])), TypeError, "items must have a length and an index"),
    ],
)
def test_what_the_loop_refuses(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
