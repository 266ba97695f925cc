"""Rules on memory where they turn, and their words, on an estimate made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_lora.facts.memory import (
    Alternative,
    MemoryEstimate,
    MemoryFacts,
    Quantization,
    StepSetting,
    Unmodelled,
)
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.facts.operations import StepFlops
from pytest_lora.rules.memory import (
    _lines,
    advice,
    against_now,
    largest_parts,
    left_whole,
    may_need_less,
    may_need_more,
    step_in_words,
    surely_fits,
)
from tests.rules.saying import says

GIB = 2**30
PARTS = {"base weights": 2 * GIB, "activations": 4 * GIB, "adapters": GIB, "workspace": 3 * GIB}
STEP = MemoryEstimate(
    StepSetting(4, 64),
    "Llama",
    8,
    10 * GIB,
    11 * GIB,
    6 * GIB,
    6 * GIB,
    PARTS,
    "backward",
    "aten.mm",
    (),
    0,
    GIB,
)
ABOVE, BELOW = Unmodelled("x is", "at most"), Unmodelled("y is", "at least")


def facts(budget: int, *unmodelled: Unmodelled, seq_len: int = 64, **changes: Any) -> MemoryFacts:
    setting = replace(STEP.setting, seq_len=seq_len)
    return MemoryFacts(replace(STEP, unmodelled=unmodelled, setting=setting, **changes), budget)


@pytest.mark.parametrize(
    ("rule", "given", "words"),
    [
        ("weights_do_not_fit", facts(6 * GIB), []),
        ("weights_do_not_fit", facts(6 * GIB - 1), ["error: base weights 2.0 GiB, adapters 1.0 GiB"]),
        ("weights_do_not_fit", facts(5 * GIB), ["error: need 6.0 GiB, 1.0 GiB more than the budget"]),
        ("weights_do_not_fit", facts(5 * GIB, ABOVE), []),
        ("weights_do_not_fit", facts(5 * GIB, BELOW), ["error: need 6.0 GiB"]),
        ("step_does_not_fit", facts(10 * GIB), []),
        ("step_does_not_fit", facts(10 * GIB - 1), ["error: activations 4.0 GiB, workspace 3.0 GiB, base weights"]),
        ("step_does_not_fit", facts(9 * GIB), ["error: the peak needs 10.0 GiB, 1.0 GiB more"]),
        ("step_does_not_fit", facts(6 * GIB), ["error: a peak of at most 6.0 GiB"]),
        ("step_does_not_fit", facts(6 * GIB - 1), []),
        ("step_does_not_fit", facts(9 * GIB, ABOVE), []),
        ("no_room_for_the_cuda_context", facts(10 * GIB), ["warning: a peak of at most 9.0 GiB"]),
        ("no_room_for_the_cuda_context", facts(11 * GIB - 1), ["warning: such as seq_len=32;"]),
        ("no_room_for_the_cuda_context", facts(10 * GIB, seq_len=1), ["warning: such as seq_len=1;"]),
        ("no_room_for_the_cuda_context", facts(11 * GIB), []),
        ("no_room_for_the_cuda_context", facts(10 * GIB - 1), []),
        ("allocator_may_run_short", facts(11 * GIB), ["info: reserve 11.0 GiB for a peak of 10.0 GiB"]),
        ("allocator_may_run_short", facts(11 * GIB), ["info: such as seq_len=32"]),
        ("allocator_may_run_short", facts(11 * GIB, seq_len=1), ["info: such as seq_len=1"]),
        ("allocator_may_run_short", facts(11 * GIB - 1), []),
        ("allocator_may_run_short", facts(12 * GIB - 1), ["info: reserve"]),
        ("allocator_may_run_short", facts(12 * GIB), []),
        ("estimate_is_a_bound", facts(10 * GIB), []),
        ("estimate_is_a_bound", facts(10 * GIB, ABOVE), []),
        ("estimate_is_a_bound", facts(10 * GIB - 1, ABOVE), ["warning: the peak is at most 10.0 GiB"]),
        ("estimate_is_a_bound", facts(10 * GIB, BELOW), ["warning: the peak is at least 10.0 GiB"]),
        ("estimate_is_a_bound", facts(10 * GIB - 1, BELOW), []),
        ("estimate_is_a_bound", facts(10 * GIB, ABOVE, BELOW), ["warning: about 10.0 GiB"]),
        ("estimate_is_a_bound", facts(10 * GIB - 1, ABOVE, BELOW), ["warning: about 10.0 GiB"]),
        ("estimate_is_a_bound", facts(11 * GIB, BELOW._replace(most=GIB)), []),
        ("estimate_is_a_bound", facts(11 * GIB - 1, BELOW._replace(most=GIB)), ["warning: at least"]),
    ],
)  # fmt: skip
def test_a_budget(rule: str, given: MemoryFacts, words: list[str]) -> None:
    says(rule, given, *words)


@pytest.mark.parametrize(
    ("quantization", "packed", "is_told"),
    [(None, 0, False), (Quantization("nf4"), 2 * GIB, False), (Quantization("nf4"), GIB, True)],
)
def test_weights_that_stay_whole(quantization: Quantization | None, packed: int, is_told: bool) -> None:
    setting = replace(STEP.setting, quantization=quantization)
    given = replace(STEP, setting=setting, breakdown={**PARTS, "quantized base weights": packed})
    said = ["warning: 1.0 GiB of weights are quantized, 2.0 GiB stay whole"] if is_told else []
    says("quantization_leaves_most_weights_whole", MemoryFacts(given, GIB), *said)
    bare = replace(given, breakdown={"base weights": GIB})
    if quantization:
        says("quantization_leaves_most_weights_whole", MemoryFacts(bare, GIB), "warning: 0 B of weights are")
        on_host = replace(setting, parallel=Parallel(2, "fsdp1", offload="cpu"))
        says("quantization_leaves_most_weights_whole", MemoryFacts(replace(bare, setting=on_host), GIB))


def test_bounds() -> None:
    more, less, both = (replace(STEP, unmodelled=parts) for parts in ((BELOW,), (ABOVE,), (ABOVE, BELOW)))
    assert [may_need_more(one) for one in (STEP, more, less, both)] == [False, True, False, True]
    assert [may_need_less(one) for one in (STEP, more, less, both)] == [False, False, True, True]
    known = replace(STEP, unmodelled=(ABOVE, BELOW._replace(most=GIB), BELOW._replace(most=2 * GIB)))
    assert [surely_fits(known, 13 * GIB - room) for room in (0, 1)] == [True, False]
    assert [surely_fits(STEP, 10 * GIB - room) for room in (0, 1)] == [True, False]
    assert not surely_fits(more, 99 * GIB)


def test_a_step_in_words() -> None:
    plain = "a step of Llama, batch 4 x 64 tokens, r=8, base in bfloat16, gradient checkpointing off"
    assert step_in_words(STEP) == plain
    setting = replace(
        STEP.setting,
        gradient_checkpointing=True,
        quantization=Quantization("nf4", double_quant=True),
        parallel=Parallel(2, "zero2"),
    )
    words = step_in_words(replace(STEP, setting=setting))
    assert words.startswith("a step of Llama, the fullest of ")
    assert words.endswith("base in nf4 with double quantization, else bfloat16, gradient checkpointing on")
    single = replace(setting, quantization=Quantization("nf4"))
    assert "base in nf4, else bfloat16" in step_in_words(replace(STEP, setting=single))
    assert largest_parts(STEP) == "activations 4.0 GiB, workspace 3.0 GiB, base weights 2.0 GiB"
    assert largest_parts(STEP, ["adapters", "nothing"]) == "adapters 1.0 GiB"


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (None, ""),
        (Parallel(2, "fsdp1"), ""),
        (Parallel(2, "zero2"), "; zero2 does not divide the weights: 2.0 GiB of them stay on every card"),
    ],
)
def test_weights_that_are_not_divided(parallel: Parallel | None, words: str) -> None:
    assert left_whole(replace(STEP, setting=replace(STEP.setting, parallel=parallel))) == words


def test_what_is_not_divided_is_counted() -> None:
    shared = replace(STEP.setting, parallel=Parallel(2, "ddp"))
    held = {"embeddings and head": 5, "adapters": 7}
    assert ": 5 B of them" in left_whole(replace(STEP, setting=shared, breakdown=held))


def test_a_share_of_operations() -> None:
    assert against_now(5, 0) == "same"
    assert [against_now(n, 100_000) for n in (100_049, 99_951, 100_051)] == ["same", "same", "+0.1 %"]
    assert [against_now(n, 100_000) for n in (109_949, 109_951, 90_049)] == ["+9.9 %", "+10 %", "-10 %"]


NF4 = {"gradient_checkpointing": True, "quantization": Quantization("nf4")}
UNTRIED: list[tuple[dict[str, Any], str]] = [
    ({}, 'a smaller batch_size, a shorter seq_len, gradient_checkpointing=True or quantization="nf4"'),
    ({"batch_size": 1, "gradient_checkpointing": True}, 'a shorter seq_len or quantization="nf4"'),
    ({"batch_size": 1, **NF4}, "a shorter seq_len"),
    ({"batch_size": 2, **NF4}, "a smaller batch_size or a shorter seq_len"),
]


@pytest.mark.parametrize(("changes", "words"), UNTRIED)
def test_what_could_help_where_nothing_was_tried(changes: dict[str, Any], words: str) -> None:
    given = replace(STEP, loaded=GIB, setting=replace(STEP.setting, **changes))
    assert (
        advice(MemoryFacts(given, GIB)).text
        == f"take {words}; check_memory with advise=True says how much each one saves"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, 'a smaller base or quantization="nf4"'),
        (NF4, "a smaller base"),
        ({"parallel": Parallel(8, "zero3")}, 'a smaller base or quantization="nf4"'),
        (
            {"parallel": Parallel(8, "zero2")},
            'a strategy that divides the weights, as ZeRO-3 and FSDP do, or quantization="nf4"',
        ),
    ],
)
def test_no_smaller_step_makes_room_for_weights(changes: dict[str, Any], words: str) -> None:
    given = replace(STEP, loaded=2 * GIB, setting=replace(STEP.setting, **changes))
    assert advice(MemoryFacts(given, GIB)).text.startswith(f"take {words}; check_memory")


def change(name: str, peak: int, flops: int = 100, smaller_rank: bool = False) -> Alternative:
    return Alternative(tuple(name.split(" with ")), peak, flops, smaller_rank=smaller_rank)


def test_the_table_of_what_would_help() -> None:
    tried = (
        change("seq_len=32", 9 * GIB + 1),
        change("gradient_checkpointing=True with batch_size=1 with accumulation=4", 9 * GIB, 120),
        change("r=4", 9 * GIB + 2**28, smaller_rank=True),
        change("r=1", 9 * GIB + 1, 40, smaller_rank=True),
    )
    given = MemoryFacts(replace(STEP, flops=StepFlops(60, 40)), 9 * GIB, tried)
    assert [line.strip() for line in advice(given).text.splitlines()] == [
        "gradient_checkpointing=True with batch_size=1 with accumulation=4: 9.0 GiB",
        "lowering the rank will not help: r=1 saves 1.0 GiB",
        "what if:",
        "change                               peak  FLOPs  training sees",
        "seq_len=32                        9.0 GiB   same  same batch     too much",
        "gradient_checkpointing=True with",
        "batch_size=1 with accumulation=4  9.0 GiB  +20 %  same batch     fits",
        "r=4                               9.2 GiB   same  same batch     too much",
        "r=1                               9.0 GiB  -60 %  same batch     too much",
    ]
    none = replace(given, budget=9 * GIB - 1)
    assert advice(none).text.startswith("none of the changes tried is enough")
    assert "will not help" not in advice(replace(given, budget=9 * GIB + 1)).text
    assert "will not help" not in advice(replace(given, alternatives=tried[:2])).text


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ((35 * "x",), [35]),
        ((36 * "x",), [36, 0]),
        ((9 * "x", 20 * "y"), [35]),
        ((9 * "x", 21 * "y"), [14, 21]),
        ((9 * "x", 36 * "y"), [14, 36, 0]),
    ],
)
def test_a_change_takes_as_many_lines_as_it_needs(changes: tuple[str, ...], lines: list[int]) -> None:
    assert [len(line) for line in _lines(changes)] == lines
