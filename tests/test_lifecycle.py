"""The lifecycle machine holds on PEFT as it is, and finds what is broken in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from peft import PeftModel
from peft.tuners.lora import Linear

from pytest_lora.lifecycle import LoraLifecycle
from tests.test_roundtrip import BATCH, base


class SmallLifecycle(LoraLifecycle):
    """On a base of one's own: two methods."""

    def make_base(self) -> Any:
        return copy.deepcopy(base())

    def make_batch(self) -> Any:
        return {**BATCH, "labels": BATCH["input_ids"]}


def run(runs: int) -> None:
    chosen = settings(
        max_examples=runs,
        stateful_step_count=15,
        derandomize=True,
        deadline=None,
        report_multiple_bugs=False,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(SmallLifecycle, settings=chosen)


def test_lives_on_a_base_of_ones_own() -> None:
    run(6)


@pytest.mark.lora_slow
def test_more_lives() -> None:
    run(15)


def test_an_unmerge_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "unmerge", lambda self: self.merged_adapters.clear())
    with pytest.raises(AssertionError, match="the output moved by") as caught:
        run(60)
    steps = [line for line in "\n".join(caught.value.__notes__).splitlines() if "state." in line]
    assert [s for s in steps if "laws" not in s and "checks" not in s and "teardown" not in s][1:] == [
        "state.merge()",
        "state.unmerge()",
    ]


def test_a_load_that_loses_values_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PeftModel.load_adapter

    def load(self: Any, *args: Any, adapter_name: str, **kwargs: Any) -> Any:
        result = real(self, *args, adapter_name=adapter_name, **kwargs)
        for name, parameter in self.named_parameters():
            if f"lora_B.{adapter_name}" in name:
                parameter.data.zero_()
        return result

    monkeypatch.setattr(PeftModel, "load_adapter", load)
    with pytest.raises(AssertionError, match="the output moved by"):
        run(60)
