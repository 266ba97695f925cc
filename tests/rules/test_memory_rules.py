"""Rules on memory, beyond the examples of their documentation: what is said, and in which order."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
from peft import LoraConfig
from transformers import BertConfig, GPT2Config, LlamaConfig, ViTConfig

from pytest_lora import (
    Evaluation,
    Finding,
    LoraHealthError,
    LoraHealthWarning,
    assert_fits_memory,
    check_memory,
    estimate_memory,
)
from pytest_lora.expect import Expect
from pytest_lora.facts.memory import MemoryFacts, Unmodelled
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.facts.operations import operation_in_words
from pytest_lora.rules import judge
from pytest_lora.rules.memory import against_now

BASE = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8, vocab_size=4000
)
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 6}
STEP: dict[str, Any] = {"batch_size": 8, "seq_len": 512}


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def finding(budget: str | int, **setting: Any) -> Finding:
    (found,) = check_memory(BASE, adapter(), budget=budget, **{**STEP, **setting}).findings
    return found


def table(found: Finding) -> list[dict[str, str]]:
    """The what-if table: in each row the change, its peak, its price, what training sees and whether it fits."""
    lines = re.sub(r" with\n +", " with ", found.fix.partition("what if:")[2])
    figures = r"(?P<peak>[\d.]+ \w+B)  +(?P<price>same|[+-][\d.]+ %)  (?P<seen>.+?)  +(?P<fits>fits|too much)"
    row = rf"^ +(?P<change>\S.*?)  +{figures}$"
    return [found.groupdict() for found in re.finditer(row, lines, flags=re.MULTILINE)]


def rows(found: Finding) -> dict[str, str]:
    """Each change and whether it fits, in order."""
    return {row["change"]: row["fits"] for row in table(found)}


def test_the_report_reads_like_a_compiler_error() -> None:
    text = str(finding("600MiB"))
    assert re.fullmatch(
        r"error\[LORA502\]: step does not fit\n"
        r"  --> a step of LlamaForCausalLM, batch 8 x 512 tokens, r=16, base in bfloat16, gradient checkpointing off\n"
        r"  observed: the peak needs \d\.\d GiB, \d+\.\d MiB more than the budget, in the backward[^;.]*; "
        r"activations \d\.\d GiB, logits and loss \d+\.\d MiB, base weights \d+\.\d MiB\n"
        r"  expected: a peak of at most 600\.0 MiB\n"
        r"  fix:      gradient_checkpointing=True: \d+\.\d MiB\n"
        r"            lowering the rank will not help: r=1 saves \d+\.\d MiB\n"
        r"            what if:\n(              .+\n?)+",
        text,
    ), text


def test_what_fits_comes_first_and_the_rank_last() -> None:
    found = rows(finding("600MiB"))
    assert next(iter(found.items())) == ("gradient_checkpointing=True", "fits")
    verdicts = list(found.values())
    assert verdicts == sorted(verdicts)
    assert list(found)[-2:] == ["r=8", "r=1"]
    assert {
        'optimizer="adamw_8bit"',
        'quantization="nf4"',
        "target_modules=['q_proj', 'v_proj']",
        "batch_size=4 with accumulation=2",
        "seq_len=256",
    } <= found.keys()


def test_each_row_says_its_price_and_what_training_sees() -> None:
    now, other = (
        estimate_memory(adapter(), BASE, **STEP, gradient_checkpointing=on).flops.total
        for on in (False, True)
    )
    found = {row["change"]: (row["price"], row["seen"]) for row in table(finding("600MiB"))}
    assert found["gradient_checkpointing=True"] == (f"{100 * (other / now - 1):+.0f} %", "same batch")
    assert 40 < 100 * (other / now - 1) < 50  # the forward again, which is about half of a LoRA's step
    assert found["batch_size=4 with accumulation=2"] == ("same", "same batch")
    assert found['optimizer="adamw_8bit"'] == ("same", "same batch, rounded")
    assert found['quantization="nf4"'] == ("same", "same batch, rounded")
    assert found["r=8"][1] == found["target_modules=['q_proj', 'v_proj']"][1] == "fewer weights"
    half = estimate_memory(adapter(), BASE, batch_size=8, seq_len=256).flops.total
    assert found["seq_len=256"] == (f"{100 * (half / now - 1):+.0f} %", "shorter texts")
    assert [against_now(n, 1000) for n in (1000, 992, 1099, 1100, 500)] == [
        "same",
        "-0.8 %",
        "+9.9 %",
        "+10 %",
        "-50 %",
    ]


def test_four_changes_at_most_in_rows_of_a_hundred_columns() -> None:
    base = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, vocab_size=1000
    )
    asked: dict[str, Any] = {"batch_size": 8, "seq_len": 8, "quantization": "nf4", "accumulation": 64}
    weights = estimate_memory(adapter(), base, **asked).loaded
    (found,) = check_memory(base, adapter(), budget=weights + 2**10, **asked).findings
    changes = [re.sub(r" with accumulation=\d+", "", change).count(" with ") + 1 for change in rows(found)]
    assert (found.code, max(changes)) == ("LORA502", 4)
    assert len(changes) == len(set(rows(found)))
    assert max(len(line) for line in found.fix.splitlines()[2:]) <= 100


def test_every_row_is_an_estimate_of_its_own() -> None:
    found = finding("600MiB")
    half = estimate_memory(adapter(), BASE, batch_size=8, seq_len=256)
    assert re.search(rf"seq_len=256 +{format_bytes(half.peak_allocated)} ", found.fix)


def test_where_one_change_is_not_enough_two_are_tried_together() -> None:
    base = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8)
    found = check_memory(base, adapter(), batch_size=1, seq_len=4096, budget="460MiB").findings[0]
    together = next(row for row in rows(found) if " with " in row)
    assert together == 'gradient_checkpointing=True with optimizer="adamw_8bit"'  # in 4 bits it needs more


def test_weights_that_do_not_fit_are_another_matter() -> None:
    found = finding("40MiB", batch_size=1, seq_len=8)
    assert found.code == "LORA501"
    assert "the loaded model weights need" in found.observed
    assert not any("seq_len" in row or "batch_size" in row for row in rows(found) if " with " not in row)


def test_where_a_smaller_rank_does_fit_nobody_says_it_does_not_help() -> None:
    config = adapter(r=256)
    peak = estimate_memory(config, BASE, batch_size=1, seq_len=8).peak_allocated
    report = check_memory(BASE, config, batch_size=1, seq_len=8, budget=peak - 2**20)
    assert "r=128" in report.findings[0].fix
    assert "will not help" not in report.findings[0].fix


def test_the_assertion_raises_warns_and_returns() -> None:
    with pytest.raises(LoraHealthError, match=r"LORA502"):
        assert_fits_memory(BASE, adapter(), budget="600MiB", **STEP)
    peak = estimate_memory(adapter(), BASE, **STEP).peak_allocated
    with pytest.warns(LoraHealthWarning, match=r"no room for the cuda context"):
        assert_fits_memory(BASE, adapter(), budget=peak + 2**20, **STEP)
    assert assert_fits_memory(BASE, adapter(), budget="80GiB", **STEP).ok
    assert assert_fits_memory(BASE, adapter(), budget="600MiB", ignore=["LORA5"], **STEP).ok


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ("24", ValueError, 'budget must carry a unit: "24GiB" (or "24GB"), got "24"'),
        (24, ValueError, 'budget is 24 bytes; write "24GiB" for gibibytes'),
        (24.0, TypeError, 'budget must be a size such as "24GiB" (or "24GB") or whole bytes, not 24.0'),
        ("cuda:7", ValueError, "budget is the device 'cuda:7', but there is no"),
    ],
)
def test_a_budget_that_is_none_is_named(budget: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        check_memory(BASE, adapter(), budget=budget, **STEP)
    assert str(raised.value).startswith(message)


def test_the_unit_of_a_budget_may_be_written_in_any_case() -> None:
    found = check_memory(BASE, adapter(), budget="0.5 gb", advise=False, **STEP).findings[0]
    assert found.expected == "a peak of at most 476.8 MiB"


def test_images_have_no_sequence_to_shorten() -> None:
    base = ViTConfig(**SMALL, image_size=32, architectures=["ViTForImageClassification"])
    config = adapter(task_type=None)
    peak = estimate_memory(config, base, batch_size=4, seq_len=1).peak_allocated
    (found,) = check_memory(base, config, batch_size=4, seq_len=1, budget=peak - 2**10).findings
    assert found.where.startswith("a step of ViTForImageClassification, batch 4, r=16, base in bfloat16, ")
    assert "batch_size=2 with accumulation=2" in rows(found)
    assert not any("seq_len" in row for row in rows(found))


@pytest.mark.parametrize(("saved", "batch"), [(["embed_tokens", "lm_head"], 64), (None, 1)])
def test_embeddings_can_be_left_frozen_and_an_evaluation_have_a_smaller_batch(
    saved: list[str] | None, batch: int
) -> None:
    base = LlamaConfig(**{**SMALL, "num_hidden_layers": 1}, vocab_size=2000)
    asked: Any = {"batch_size": 1, "seq_len": 8, "evaluation": Evaluation(batch_size=batch)}
    config = adapter(modules_to_save=saved, target_modules=["q_proj"], r=1)
    peak = estimate_memory(config, base, **asked).peak_allocated
    changes = rows(check_memory(base, config, budget=peak - 2**10, **asked).findings[0])
    assert ("modules_to_save=None" in changes) is bool(saved)
    assert ("evaluation=Evaluation(batch_size=1)" in changes) is (batch > 1)


def test_what_cannot_be_built_is_no_advice() -> None:
    """A layer that is trained in full cannot be packed."""
    base = BertConfig(**SMALL)
    config = adapter(
        task_type=None, target_modules=["query", "value"], modules_to_save=["intermediate.dense"]
    )
    with pytest.raises(ValueError, match="PEFT refuses it on this base"):
        estimate_memory(config, base, batch_size=4, seq_len=96, quantization="nf4")
    peak = estimate_memory(config, base, batch_size=4, seq_len=96).peak_allocated
    (found,) = check_memory(base, config, batch_size=4, seq_len=96, budget=peak - 2**20).findings
    assert not any("nf4" in row for row in rows(found))
    assert {"seq_len=48", "gradient_checkpointing=True"} <= rows(found).keys()


def test_two_changes_come_before_three_and_none_that_needs_more() -> None:
    """Packing a small base costs more than it saves: what is not packed is cast to float32."""
    base, asked = GPT2Config(n_embd=64, n_head=4, n_layer=6), {"batch_size": 2, "seq_len": 96}
    config = adapter(target_modules=["c_attn"])
    fields: dict[str, Any] = {"gradient_checkpointing": True, "optimizer": "adamw_8bit", "accumulation": 2}
    fitting = estimate_memory(config, base, batch_size=1, seq_len=96, **fields).peak_allocated
    found = check_memory(base, config, budget=fitting, **asked).findings[0]
    assert rows(found)['quantization="nf4"'] == "too much"
    assert next(iter(rows(found).items())) == (
        "gradient_checkpointing=True with batch_size=1 with accumulation=2",
        "fits",
    )


def test_an_unknown_setting_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="has no argument 'quantisation'; write quantization="):
        check_memory(BASE, adapter(), budget="24GiB", quantisation="nf4", **STEP)


def test_a_bound_fails_no_assertion_in_the_wrong_direction() -> None:
    """An upper bound above the budget is no fault, nor is a lower bound below it a proof."""
    upper = copy.deepcopy(BASE)
    upper.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    peak = estimate_memory(adapter(), upper, **STEP).peak_allocated
    for budget, codes in ((peak - 2**20, ["LORA506"]), (peak // 2, ["LORA506"]), (80 * 2**30, [])):
        report = check_memory(upper, adapter(), budget=budget, advise=False, **STEP)
        assert [f.code for f in report.findings] == codes
        assert not report.errors

    lower = MemoryFacts(
        replace(estimate_memory(adapter(), BASE, **STEP), unmodelled=(Unmodelled("more is", "at least"),)),
        budget=80 * 2**30,
    )
    assert [f.code for f in judge([lower], Expect())] == ["LORA506"]
    assert "LORA502" in {f.code for f in judge([replace(lower, budget=peak // 2)], Expect())}

    known = replace(lower.estimate, unmodelled=(Unmodelled("more is", "at least", 2**30),))
    for room, unsettled in ((2**30, False), (2**29, True)):
        said = {f.code for f in judge([MemoryFacts(known, known.peak_allocated + room)], Expect())}
        assert ("LORA506" in said) is unsettled


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("aten._log_softmax_backward_data.default", "log-softmax of the loss over the vocabulary"),
        ("aten._softmax.default", "softmax of attention scores"),
        ("aten._scaled_dot_product_flash_attention.default", "attention"),
        ("aten.addmm.default", "matrix product"),
        ("bitsandbytes.dequantize_4bit.default", "unpacking of a quantized weight"),
        ("aten._foreach_addcdiv_.Scalar", "step of the optimizer"),
        ("aten.cumsum.default", "cumsum"),
        ("gather", "gather"),
    ],
)
def test_operations_in_words(operation: str, words: str) -> None:
    assert operation_in_words(operation) == words


def test_why_four_bits_may_take_more_than_sixteen_is_said() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    step: dict[str, Any] = {
        "batch_size": 8,
        "seq_len": 512,
        "quantization": "nf4",
        "budget": "2GiB",
        "advise": False,
    }
    for cast, said in ((True, 1), (False, 0)):
        (finding,) = check_memory(
            config, "Qwen/Qwen2.5-0.5B", **step, prepare_for_kbit=cast, select=["LORA502"]
        ).findings
        assert finding.observed.count("casts embeddings, norms and head to float32") == said
        assert finding.where.count("else float32 by prepare_model_for_kbit_training") == said
