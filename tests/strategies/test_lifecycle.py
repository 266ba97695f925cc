"""The lifecycle machine holds on PEFT as it is, and finds what is broken in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear, LoraModel, bnb
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from pytest_lora.inspection.peft_internals import SVD_SCALES_TWICE
from pytest_lora.strategies.lifecycle import LoraLifecycle


class Network(nn.Module):
    """An embedding, two linear layers and a head: what PEFT does with them costs more than they do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 32)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        logits = self.head(hidden + self.down(nn.functional.gelu(self.up(hidden))))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class SmallLifecycle(LoraLifecycle):
    """On a base of one's own."""

    targets = ("embed", "up", "down")

    def make_base(self) -> Any:
        return Network()

    def make_batch(self) -> Any:
        ids = torch.arange(32).view(2, 16)
        return {"input_ids": ids, "labels": ids.flip(1)}


class Unjudged(SmallLifecycle):
    """Without the laws, which would find in one step what others find in two."""

    hold_laws: Any = None


def run(runs: int, machine: type[LoraLifecycle] = SmallLifecycle) -> None:
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
    run_state_machine_as_test(machine, settings=chosen)


def test_lives_on_a_base_of_ones_own() -> None:
    run(4)


def test_an_unmerge_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (Linear, Embedding):
        monkeypatch.setattr(layer, "unmerge", lambda self: self.merged_adapters.clear())
    with pytest.raises(AssertionError, match="the output moved by") as caught:
        run(60, Unjudged)
    steps = [line for line in "\n".join(caught.value.__notes__).splitlines() if "state." in line]
    assert [s for s in steps if "laws" not in s and "checks" not in s and "teardown" not in s][1:] == [
        "state.merge()",
        "state.unmerge()",
    ]


# ------------------------------------------------------------------ single steps


class Drawn:
    """In the place of what Hypothesis would draw within a step."""

    def __init__(self, *values: Any) -> None:
        self.values = list(values)

    def draw(self, strategy: Any) -> Any:
        return self.values.pop(0)


@pytest.fixture
def life() -> Any:
    """A life with two adapters of one rank."""
    machine: Any = SmallLifecycle()
    machine.begin(seed=1, rank=4, variant="plain")
    machine.add(seed=2, rank=4, variant="plain")
    return machine


SVD = pytest.param("svd", marks=pytest.mark.skipif(SVD_SCALES_TWICE, reason="PEFT before 0.21 scales twice"))


@pytest.mark.parametrize("kind", ["cat", SVD, "linear"])
def test_two_adapters_are_combined(life: Any, kind: str) -> None:
    life.combine(Drawn(["first", "second"], 0.5, 2.0, kind))
    life.laws_hold()
    assert set(life.outputs) == {"first", "second", "third"}


def test_a_base_is_packed_under_its_adapters(life: Any) -> None:
    before = dict(life.outputs)
    life.quantize()
    life.laws_hold()
    life.checks_pass()
    life.hold_laws()
    assert type(life.model.get_submodule("base_model.model.up")).__name__ == "Linear4bit"
    assert not any(torch.equal(before[name], life.outputs[name]) for name in before)
    life.train()
    life.rename()
    life.laws_hold()


def rules_of(machine: Any) -> Any:
    return machine.rules() if callable(machine.rules) else machine.rules  # a method in older versions


def test_quantizing_can_be_switched_off(life: Any) -> None:
    class Whole(SmallLifecycle):
        quantizes = False

    def may(machine: Any) -> bool:
        (rule,) = (r for r in rules_of(machine) if r.function.__name__ == "quantize")
        return all(condition(machine) for condition in rule.preconditions)

    whole: Any = Whole()
    whole.begin(seed=1, rank=4, variant="plain")
    assert may(life)
    assert not may(whole)


def test_a_load_that_loses_values_is_found(life: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PeftModel.load_adapter

    def load(self: Any, *args: Any, adapter_name: str, **kwargs: Any) -> Any:
        result = real(self, *args, adapter_name=adapter_name, **kwargs)
        for name, parameter in self.named_parameters():
            if f"lora_B.{adapter_name}" in name:
                parameter.data.zero_()
        return result

    monkeypatch.setattr(PeftModel, "load_adapter", load)
    with pytest.raises(AssertionError, match="adapter 'second', loaded: the output moved by"):
        life.save_and_load()


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_a_combination_with_another_weight_is_found(
    life: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real = LoraModel.add_weighted_adapter

    def add(self: Any, adapters: Any, weights: list[float], *args: Any, **kwargs: Any) -> None:
        real(self, adapters, [weights[0], 1.1 * weights[1]], *args, **kwargs)

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", add)
    with pytest.raises(AssertionError, match=f"{kind} of .*: the update is .* away from that combination"):
        life.combine(Drawn(["first", "second"], 0.5, 2.0, kind))


def test_an_adapter_that_does_not_act_in_4_bits_is_found(life: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.Linear4bit, "forward", lambda self, x: self.base_layer(x))
    with pytest.raises(AssertionError, match="adapter 'first' in 4 bits: the output moved by"):
        life.quantize()


def test_a_breach_of_a_law_is_found(life: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 2 * real(self, adapter))
    with pytest.raises(AssertionError, match="LORA915"):
        life.hold_laws()
