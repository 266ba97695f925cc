"""What a search costs: Hypothesis notes no line of a dry run, and an example has as many choices as any other."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import GPT2Config, LlamaConfig

from pytest_lora import estimate_memory
from pytest_lora.assertions import asserting
from pytest_lora.findings import Report
from pytest_lora.inspection.memory.predictor import Predictor
from pytest_lora.inspection.quiet import unexplained
from pytest_lora.strategies import configs, lora_configs, shapes, training_shapes
from tests.strategies.test_configs import draws

SMALL = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=128
)


def lines_are_noted() -> bool:
    """Whether Hypothesis looks which lines run, as it does after a first failure."""
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:
        return "scrutineer" in type(getattr(sys.gettrace(), "__self__", None)).__module__
    return any(monitoring.get_tool(n) == "scrutineer" and monitoring.get_events(n) for n in range(6))


def test_hypothesis_notes_no_line_of_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Predictor._at
    seen: list[tuple[bool, bool, bool]] = []
    inside = False

    def asked(self: Predictor, *point: Any) -> Any:
        nonlocal inside
        inside = lines_are_noted()
        return at(self, *point)

    monkeypatch.setattr(Predictor, "_at", asked)

    @settings(draws(4), phases=settings().phases, print_blob=False)
    @given(st.integers(1, 4))
    def fails(batch_size: int) -> None:
        before = lines_are_noted()
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        estimate_memory(config, SMALL, batch_size=batch_size, seq_len=8)
        seen.append((before, inside, lines_are_noted()))
        raise AssertionError

    tracer = sys.gettrace()
    sys.settrace(None)  # where coverage or a debugger looks, Hypothesis does not
    try:
        with pytest.raises(AssertionError):
            fails()
    finally:
        sys.settrace(tracer)
    assert (True, False, True) in seen, "noted before and after, and not within"
    assert not any(within for _, within, _ in seen)


def test_hypothesis_notes_no_line_of_a_draw_nor_of_an_assertion(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[bool]] = {"config": [], "shape": [], "check": [], "test": []}

    def noting(what: str, function: Any) -> Any:
        def noted(*args: Any, **named: Any) -> Any:
            seen[what].append(lines_are_noted())
            return function(*args, **named)

        return noted

    monkeypatch.setattr(configs, "drawn_fields", noting("config", configs.drawn_fields))
    monkeypatch.setattr(shapes, "TrainingShape", noting("shape", shapes.TrainingShape))
    report = Report("nothing", ())
    assertion = asserting(noting("check", lambda base: report), "assert_nothing")

    @settings(draws(4), phases=settings().phases, print_blob=False)
    @given(lora_configs(), training_shapes())
    def fails(config: Any, shape: Any) -> None:
        assert assertion(None) is report
        seen["test"].append(lines_are_noted())
        raise AssertionError

    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        with pytest.raises(AssertionError):
            fails()
    finally:
        sys.settrace(tracer)
    assert any(seen.pop("test"))
    assert all(noted and not any(noted) for noted in seen.values()), seen


def test_tracers_of_others_stay() -> None:
    def tracer(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with unexplained():
            within = sys.gettrace()
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert (within, after) == (tracer, tracer)


@pytest.mark.parametrize(
    "base",
    [SMALL, GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=128), None],
    ids=["llama", "gpt2", "no base"],
)
def test_examples_have_as_many_choices_each(base: Any) -> None:
    """Parts of an example then keep their places, so that shrinking and explaining take half as many tries."""
    lengths: set[int] = set()

    @draws(30)
    @given(st.data())
    def count(data: Any) -> None:
        data.draw(lora_configs(base))
        data.draw(training_shapes())
        lengths.add(len(data.conjecture_data.nodes))

    count()
    assert len(lengths) == 1, lengths
