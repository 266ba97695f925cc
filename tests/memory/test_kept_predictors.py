"""What is kept from one estimate for the next never changes an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import step_memory

FRESH = """
import json, os, sys
from tests.memory.test_kept_predictors import answer
import pytest_lora.memory.estimate
import peft, transformers, bitsandbytes, torch
answers = []
for drawn in json.loads(sys.stdin.read()):
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, json.dumps(answer(drawn)).encode())
        os._exit(0)
    answers.append(json.loads(os.read(reading, 4096)))
    os.close(reading), os.close(writing), os.wait()
print(json.dumps(answers))
"""

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
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps(drawn),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told = json.loads(fresh.stdout.splitlines()[-1])
    assert [(one, a) for one, a in zip(drawn, warm, strict=True)] == [
        (one, a) for one, a in zip(drawn, told, strict=True)
    ]


def test_the_attention_of_the_base_is_part_of_what_is_asked() -> None:
    sdpa, eager = ({"base": {"attention": name}, "adapter": {}, "setting": {}} for name in ("sdpa", "eager"))
    assert answer(sdpa) < answer(eager)
    assert answer(sdpa) == answer(sdpa)
