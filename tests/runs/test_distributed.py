"""Several processes on one machine, with gloo on the CPU."""

from __future__ import annotations

import re
import signal
import time

import pytest
import torch

from pytest_lora import RanksFailedError, assert_adapters_in_sync, run_distributed
from pytest_lora.runs import distributed
from tests import ranks
from tests.forked import fork_ranks
from tests.simulated_cuda import MACHINES, play

pytestmark = pytest.mark.lora_slow


def failure(fn: object, **options: object) -> str:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(fn, **options)
    return str(caught.value)


def test_the_traceback_of_the_failing_rank_is_told_and_handlers_of_signals_are_what_they_were() -> None:
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in names]
    told = failure(ranks.second_raises)
    assert told.startswith(
        "second_raises failed\n\nrank 1 of 2 raised:\nTraceback (most recent call last):\n"
    )
    assert 'ranks.py", line' in told
    assert "\nZeroDivisionError: only the second" in told
    assert told.count("Traceback") == 1
    assert [signal.getsignal(number) for number in names] == before


def test_a_rank_that_dies_is_told_before_those_that_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch)
    told = failure(ranks.second_dies)
    assert re.match(
        r"second_dies failed\n\nrank 1 of 2 (died without raising|ended with exit code 7)(\n\n|$)", told
    )
    assert "Traceback" not in told


def test_ranks_that_wait_for_ever_are_ended_and_say_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch)
    started = time.monotonic()
    told = failure(ranks.second_never_comes, timeout=3)
    assert time.monotonic() - started < 60
    assert "rank 1 of 2 did not end in time:\n" in told
    # A rank that began later than the other notices that this one is gone before its own time is up.
    assert re.search(r"rank 0 of 2 (did not end in time:\n|failed after that: )", told)
    assert re.search(r'ranks\.py", line \d+ in second_never_comes', told, re.DOTALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, "world_size must be at least 1, not 0"),
        ({"backend": "mpi"}, "backend must be one of gloo, nccl, not 'mpi'"),
        ({"timeout": 0}, "timeout must be a finite number above 0 and at most 9.22337e+09, not 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_distributed(ranks.no_adapter, **options)


def test_functions_that_no_rank_can_import_are_refused() -> None:
    def inner() -> None: ...

    for fn in (inner, lambda: None, "who"):
        with pytest.raises(TypeError, match=r"^fn must be a function at the top level of a module, "):
            run_distributed(fn)


def test_every_rank_runs_and_returns() -> None:
    assert run_distributed(ranks.who, 2, "gloo", args=["rank"]) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.fixture(scope="module")
def told() -> list[dict[str, str]]:
    """What two ranks are told of each model."""
    with pytest.MonkeyPatch.context() as patch:
        fork_ranks(patch)
        return run_distributed(ranks.every_verdict)


@pytest.mark.parametrize("model", ["in sync", "sharded"])
def test_adapters_in_sync_pass_on_every_rank(told: list[dict[str, str]], model: str) -> None:
    assert [rank[model] for rank in told] == ["", ""]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "drifting",
            [
                "4 of 4 weights on 2 ranks",
                "observed: the gradients are not averaged over the ranks: module",
                "module.base_model.model.0.lora_B.default.weight: rank 1 unlike rank 0, by up to ",
            ],
        ),
        ("late seed", ["2 of 4 weights on 2 ranks", "the ranks began with other random numbers: ", "lora_A"]),
        (
            "unlike shapes",
            [
                "model.0.lora_B.default.weight: rank 1 unlike rank 0, in shape or dtype",
                "model.2.lora_B.default.weight: rank 1 unlike rank 0, where only some have it",
            ],
        ),
        (
            "left out",
            [
                "1 of 4 weights on 2 ranks",
                "base_model.model.0.lora_B.default.weight: rank 1 unlike rank 0, by up to",
            ],
        ),
    ],
)
def test_what_differs_is_named_on_every_rank(
    told: list[dict[str, str]], model: str, words: list[str]
) -> None:
    for rank in told:
        assert rank[model].startswith("LoraHealthError: LORA950: adapter on 2 ranks: 1 error\n")
        for part in words:
            assert part in rank[model]
    assert "lora_B.default.weight: " not in told[0]["late seed"]


def test_a_model_without_adapter_and_a_process_without_group_are_refused(told: list[dict[str, str]]) -> None:
    for rank in told:
        assert rank["no adapter"].startswith(
            "TypeError: model: this Linear has no adapter: no LoRA weights and nothing that"
        )
    with pytest.raises(RuntimeError, match=r"^check_adapters_in_sync needs a process group"):
        assert_adapters_in_sync(ranks.adapter())


@pytest.mark.lora_gpu(count=2)
def test_adapters_sharded_by_the_first_fsdp_are_put_together() -> None:
    assert run_distributed(ranks.sharded, 2, "nccl", args=[False]) == [True, True]


@pytest.mark.parametrize(("name", "runs"), [("H200", False), ("L4", False), ("two L4", True), ("MIG", False)])
def test_nccl_needs_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch, name: str, runs: bool) -> None:
    played = play(monkeypatch, MACHINES[name])
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    if runs:
        distributed._require_gpus(2)
    else:
        with pytest.raises(
            ValueError, match=r"needs a GPU for each of 2 ranks, and this process sees 1; .*count=2"
        ):
            run_distributed(ranks.no_adapter, 2, "nccl")
    assert not played.started


def test_nccl_is_asked_for_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch .* is built without it; use 'gloo'"):
        run_distributed(ranks.no_adapter, 2, "nccl")
