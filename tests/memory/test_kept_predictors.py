"""What is kept from one estimate for the next never changes an answer."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import step_memory
from tests.forked import begin_anew, fork


def fresh_answers(drawn: list[dict[str, Any]]) -> list[list[int]]:
    """Each from a process in which nothing was estimated before."""

    def asked() -> list[Any]:
        begin_anew()
        importlib.import_module("pytest_lora.memory.estimate")
        anew: Any = importlib.import_module(__name__)
        return [told_by(partial(anew.answer, one)) for one in drawn]

    answers: list[list[int]] = told_by(asked)
    return answers


def told_by(work: Callable[[], Any]) -> Any:
    """What a function gives in a process of its own, by JSON."""
    reading, writing = os.pipe()
    pid = fork(lambda: os.write(writing, json.dumps(work()).encode()) and 0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(told)


DRAWN = st.fixed_dictionaries(
    {
        "base": st.fixed_dictionaries(
            {},
            optional={
                "attention": st.sampled_from(["eager", "sdpa"]),
                "attention_dropout": st.sampled_from([0.0, 0.1]),
                "hidden_act": st.sampled_from(["gelu", "silu"]),
                "tie_word_embeddings": st.booleans(),
                "num_key_value_heads": st.sampled_from([1, 4]),
            },
        ),
        "adapter": st.fixed_dictionaries(
            {},
            optional={
                "use_dora": st.booleans(),
                "lora_dropout": st.sampled_from([0.0, 0.1]),
                "lora_bias": st.booleans(),
                "target_modules": st.sampled_from([["q_proj"], ["q_proj", "down_proj"], "all-linear"]),
            },
        ),
        "setting": st.fixed_dictionaries(
            {},
            optional={
                "quantization": st.sampled_from(["nf4", "int8"]),
                "adapter_dtype": st.sampled_from(["float32", "bfloat16"]),
                "gradient_checkpointing": st.sampled_from([True, "reentrant"]),
                "outputs_held": st.booleans(),
                "autocast": st.booleans(),
                "padding_mask": st.booleans(),
                "optimizer": st.sampled_from(["sgd", "adamw_8bit"]),
                "accumulation": st.sampled_from([1, 2]),
            },
        ),
    }
)


def answer(drawn: dict[str, Any]) -> list[int]:
    fields = dict(drawn["base"])
    attention = fields.pop("attention", None)
    base = LlamaConfig(
        **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, **fields},
        num_hidden_layers=2,
        vocab_size=128,
    )
    if attention:
        base._attn_implementation = attention
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **drawn["adapter"]})
    estimate = step_memory(config, base, **drawn["setting"]).estimate(2, 33)
    return [estimate.loaded, estimate.peak_allocated, estimate.after_step]


@pytest.mark.lora_slow
def test_a_warm_process_says_what_a_fresh_one_says() -> None:
    """Pairs that differ in one field: what the first leaves behind must not answer for the second."""
    drawn: list[dict[str, Any]] = []

    @seed(0)
    @settings(max_examples=3, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(DRAWN)
    def draw(one: dict[str, Any]) -> None:
        drawn.append(one)
        drawn.extend(
            {**one, part: {n: v for n, v in fields.items() if n != left_out}}
            for part, fields in one.items()
            for left_out in fields
        )

    draw()
    warm = [answer(one) for one in drawn]
    told = fresh_answers(drawn)
    assert [(one, a) for one, a in zip(drawn, warm, strict=True)] == [
        (one, a) for one, a in zip(drawn, told, strict=True)
    ]


def test_the_attention_of_the_base_is_part_of_what_is_asked() -> None:
    sdpa, eager = ({"base": {"attention": name}, "adapter": {}, "setting": {}} for name in ("sdpa", "eager"))
    assert answer(sdpa) < answer(eager)
    assert answer(sdpa) == answer(sdpa)
