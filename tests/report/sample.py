"""A session with something of everything, and one in which every text is of the reader's choosing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from pytest_lora.facts.figures import (
    AdapterMap,
    CellState,
    LossCurve,
    MemoryBudget,
    RankSweep,
    RankTrial,
    WhatIf,
)
from pytest_lora.facts.figures.recipes import RecipeCard, SettingRow
from pytest_lora.findings import Finding, Report
from pytest_lora.report.session import GpuUse, RanTest, Session

GIB = 2**30
COLUMNS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
LAYERS = 16

MERGED = Finding(
    "LORA203",
    "adapter_left_merged",
    "error",
    "16 modules: model.layers.*.self_attn.q_proj",
    "adapter 'default' is merged into the base weights",
    "adapters apart from the base weights while they train",
    "call model.unmerge_adapter() before training",
)
TOO_LARGE = Finding(
    "LORA502",
    "step_does_not_fit",
    "error",
    "a step of LlamaForCausalLM, batch 4 x 2048 tokens, r=16",
    "the peak needs 73.8 GiB, 49.8 GiB more than the budget",
    "a peak of at most 24.0 GiB",
    "gradient_checkpointing=True: 12.1 GiB\nwhat if:\n  gradient_checkpointing=True  12.1 GiB  fits",
)
SCALING = Finding(
    "LORA127", "scaling_differs_from_expected", "warning", "mlp.up_proj", "2", "4", "set lora_alpha=32"
)
RANDOM = Finding("LORA129", "init_is_random", "info", "model", "random", "zero", "nothing, if it is meant")


def state(layer: int, column: int) -> CellState | None:
    if column == 1 and layer in (3, 9):
        return "dead"
    if column == 2 and layer >= 14:
        return "missing"
    return "idle" if layer == 1 else "frozen" if layer == 0 else "live"


def grid(value: Callable[[int, int], Any]) -> tuple[Any, ...]:
    here = [(layer, column) for layer in range(LAYERS) for column in range(3)]
    return tuple(None if state(*cell) == "missing" else value(*cell) for cell in here)


MAP = AdapterMap(
    "LlamaForCausalLM in 4bit",
    "default",
    tuple(f"model.layers.{n}" for n in range(LAYERS)),
    COLUMNS,
    tuple(state(layer, column) for layer in range(LAYERS) for column in range(3)),
    grid(lambda layer, column: 32 if column < 2 else 8),
    grid(lambda layer, column: 2.0),
    grid(lambda layer, column: 0.0 if state(layer, column) == "dead" else round(0.03 / (1 + layer), 4)),
    grid(lambda layer, column: 0.0 if state(layer, column) == "dead" else 0.001),
    41_943_040,
    6_780_358_656,
)
FALLING = LossCurve(
    "loss over 20 steps",
    tuple(range(20)),
    tuple(4 * math.exp(-n / 9) for n in range(20)),
    (),
    (),
    (0, 20),
    4.02,
    0.71,
    0.01,
)
BROKEN = LossCurve(
    "history of 30 training losses",
    tuple(range(10, 310, 10)),
    tuple(math.nan if n == 25 else 3 - n / 20 for n in range(30)),
    (100, 200),
    (2.6, 2.0),
    (10, 250),
    3.0,
    1.8,
    None,
)
BUDGET = MemoryBudget(
    "LlamaForCausalLM, batch 4 x 2048 tokens, r=16",
    (("activations", 66 * GIB), ("quantized base weights", 3 * GIB), ("workspace", 8_519_680)),
    69 * GIB + 8_519_680,
    70 * GIB,
    24 * GIB,
    "backward, aten._log_softmax_backward_data.default",
    (WhatIf("gradient_checkpointing=True", 12 * GIB, True), WhatIf("r=1", 68 * GIB, False)),
)
SWEEP = RankSweep(
    "LlamaForCausalLM on 10 % of the data",
    "accuracy",
    True,
    (
        RankTrial(4, 0.92, 0.006, 312.0, 3.1e15, 11 * GIB, 2_097_152),
        RankTrial(8, 0.941, None, 318.0, 3.12e15, 11 * GIB, 4_194_304),
        RankTrial(16, None, None, 12.0, None, None, 8_388_608, "ran out of memory"),
    ),
    8,
    ("rank 8 has 100 % of the best accuracy",),
    0.894,
)

RECIPE = RecipeCard(
    "qlora.yaml",
    "Axolotl",
    (
        SettingRow("base", "Qwen/Qwen2.5-7B", "line 1"),
        SettingRow("quantization", "-", "line 9", "load_in_4bit: true", "only under adapter: qlora"),
    ),
    (("sequences a step", "64 (2 x 4 accumulated x 8 GPUs)"), ("epochs", "3")),
    30 * GIB,
    24 * GIB,
    8,
    False,
)


def ran(name: str, outcome: str, *reports: Report, **fields: Any) -> RanTest:
    file = name.partition("::")[0]
    made = RanTest(name, outcome, 0.4, file, 18, "", reports)
    return dataclasses.replace(made, **fields)


SESSION = Session(
    name="support-bot",
    state="finished",
    problem="",
    started="2026-11-25T10:31:04+00:00",
    seconds=141.2,
    collected=40,
    counts=(("failed", 4), ("passed", 32), ("skipped", 4)),
    folder="/home/team/support-bot",
    command="pytest tests -n 4 --lora-report=report.html",
    versions=(("pytest-lora", "0.1.0"), ("torch", "2.13.0")),
    seeds=(("pytest-randomly", "1234"),),
    tests=(
        ran("tests/test_adapter.py::test_merged", "failed", Report("model", (MERGED, SCALING))),
        ran(
            "tests/test_adapter.py::test_reach", "failed", Report("training", (MERGED,), (MAP,)), seconds=2.5
        ),
        ran("tests/test_memory.py::test_fits", "failed", Report("memory", (TOO_LARGE,), (BUDGET,))),
        ran("tests/test_learning.py::test_learns", "passed", Report("loss", (), (FALLING,))),
        ran("tests/test_learning.py::test_history", "passed", Report("history", (RANDOM,), (BROKEN,))),
        ran("tests/test_scaling.py::test_alpha", "passed", Report("model", (SCALING,)), seconds=11.0),
        ran("tests/test_ranks.py::test_sweep", "passed", Report("sweep", (), (SWEEP,))),
        ran(
            "tests/test_gpu.py::test_step",
            "passed",
            gpu=GpuUse(("cuda:0",), 36 * GIB, 80 * GIB, 37 * GIB, None, 12.3, None, None),
        ),
        ran(
            "tests/test_gpu.py::test_large",
            "skipped",
            gpu=GpuUse((), None, None, None, None, None, "needs 80 GB on one device; cuda:0 has 24 GB", None),
        ),
        ran("tests/test_data.py::test_tokens", "failed", message="AssertionError: assert 3 == 4"),
    ),
)
"""Four tests found errors or failed otherwise, one has a warning, three are healthy; two used a GPU."""


def worded(text: str) -> Session:
    """The same session with the text in the place of each that comes from outside."""
    finding = dataclasses.replace(MERGED, where=text, observed=text, expected=text, fix=f"{text}\n{text}")
    named = dataclasses.replace(finding, code=text, rule=text)
    shown = (
        dataclasses.replace(MAP, base=text, adapter=text, rows=(f"{text}.0",), columns=(text,), **ONE_CELL),
        dataclasses.replace(FALLING, title=text),
        dataclasses.replace(
            BUDGET, title=text, breakdown=((text, 5),), peak_at=text, what_if=(WhatIf(text, 5, False),)
        ),
        dataclasses.replace(
            SWEEP,
            title=text,
            metric=text,
            reasons=(text,),
            trials=(dataclasses.replace(SWEEP.trials[2], problem=text),),
        ),
        dataclasses.replace(
            RECIPE,
            title=text,
            tool=text,
            rows=(SettingRow(text, text, text, text, text),),
            steps=((text, text),),
        ),
    )
    gpu = GpuUse((text,), 1, 2, 3, 4, 5.0, None, text)
    return dataclasses.replace(
        SESSION,
        name=text,
        state="crashed",
        problem=text,
        folder=text,
        command=text,
        versions=((text, text),),
        seeds=((text, text),),
        counts=((text, 3),),
        tests=(
            ran(
                "t",
                "failed",
                Report(text, (finding, named), shown, ((text, 1),), ((text, text),)),
                nodeid=text,
                file=text,
                gpu=gpu,
            ),
            ran("t", "failed", nodeid=text, message=text),
            ran("t", "skipped", nodeid=text, gpu=dataclasses.replace(gpu, skipped=text)),
        ),
    )


ONE_CELL: dict[str, Any] = {
    "states": ("dead",),
    "ranks": (8,),
    "scalings": (2.0,),
    "gradients": (0.0,),
    "updates": (0.0,),
}
