"""What a draw costs, and whether what is drawn is what it should be.

``python benchmarks/strategies.py [--searches] [--starts N] [--draws N] [--json PATH]`` searches for a step of
Llama-2-7B that does not fit 24 GiB, from N starts: the time until the smallest is found, and with Hypothesis' hundred
variations of it, which explain the failure. That is all with ``--searches``; the rest of the file then stays as it was.
A search is in the file once it is over, and Hypothesis bounds it: five minutes to shrink. Then it times draws of
``lora_configs`` (Llama-2-7B without weights), ``lora_models`` and ``adapter_folders``, draws N configurations, sound
and faulty, on each of six architectures, and judges them with ``check_config`` and ``check_model``, and N saved
adapters, whole and damaged, with ``check_checkpoint``. It prints Markdown tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import hypothesis
import peft
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from pytest_lora import (
    LoraHealthError,
    Report,
    assert_fits_memory,
    check_checkpoint,
    check_config,
    check_model,
)
from pytest_lora.strategies import (
    AdapterFolder,
    TrainingShape,
    adapter_folders,
    lora_configs,
    lora_models,
    misconfigured_lora_configs,
    training_shapes,
)
from pytest_lora.strategies.models import tiny_base
from tests.strategies.test_configs import NAMES, model


def draws(number: int) -> settings:
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def cost(strategy: st.SearchStrategy[Any], number: int) -> dict[str, float]:
    """Median and 90th percentile of the time of a draw, in milliseconds."""
    times: list[float] = []

    @draws(number)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        started = time.perf_counter()
        data.draw(strategy)
        times.append(1e3 * (time.perf_counter() - started))

    run()
    return {"median_ms": round(median(times), 2), "p90_ms": round(sorted(times)[int(0.9 * len(times))], 2)}


def loud(report: Report) -> list[str]:
    return [f.code for f in report.findings if f.severity != "info"]


def judged(name: str, number: int) -> dict[str, Any]:
    """How many draws on one base were as they should be; the others in words."""
    base = model(name)
    result: dict[str, Any] = {"base": name, "sound": 0, "not_sound": [], "faulty": 0, "missed": []}

    @draws(number)
    @given(lora_configs(base))
    def sound(config: Any) -> None:
        found = loud(check_config(config, base))
        adapted = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        found += loud(check_model(adapted))
        result["sound"] += 1
        if found:
            result["not_sound"].append(f"{found}: {config}")

    @draws(number)
    @given(misconfigured_lora_configs(base))
    def faulty(drawn: Any) -> None:
        config, code = drawn
        result["faulty"] += 1
        if code not in {f.code for f in check_config(config, base).findings}:
            result["missed"].append(f"{code}: {config}")

    sound()
    faulty()
    return result


def folders(number: int) -> dict[str, Any]:
    """How many saved adapters were named as they should be, with and without their base."""
    result: dict[str, Any] = {"whole": 0, "not_whole": [], "damaged": {}, "missed": []}

    @draws(number)
    @given(adapter_folders(damaged=False))
    def whole(folder: AdapterFolder) -> None:
        found = loud(check_checkpoint(folder.path)) + loud(check_checkpoint(folder.path, tiny_base()))
        result["whole"] += 1
        if found:
            result["not_whole"].append(str(found))

    @draws(number)
    @given(adapter_folders(damaged=True))
    def damaged(folder: AdapterFolder) -> None:
        result["damaged"][folder.code] = result["damaged"].get(folder.code, 0) + 1
        for base in (None, tiny_base()):
            if folder.code not in {f.code for f in check_checkpoint(folder.path, base).findings}:
                result["missed"].append(folder.code)

    whole()
    damaged()
    return result


SEARCHES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "all-linear, plain": (
        {"targets": "all-linear", "variants": []},
        {
            "quantizations": ["nf4"],
            "optimizers": ["adamw_torch"],
            "gradient_checkpointing": [False],
        },
        {"quantization": "nf4"},
    ),
    "default": ({}, {}, {"quantization": "nf4", "gradient_checkpointing": True}),
}
"""Arguments of ``lora_configs``, of ``training_shapes``, and of every estimate."""


def search(name: str, start: int) -> dict[str, Any]:
    """Find and shrink a step of Llama-2-7B in 4 bits that does not fit 24 GiB; the first estimate is part of it.

    Args:
        name: Of ``SEARCHES``.
        start: What Hypothesis draws from.
    """
    llama, tried = LlamaConfig(), 0
    seen: dict[str, float] = {}
    configured, shaped, setting = SEARCHES[name]
    found: list[tuple[LoraConfig, TrainingShape]] = []

    @seed(start)
    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(lora_configs(llama, **configured), training_shapes(**shaped))
    def fits(config: LoraConfig, shape: TrainingShape) -> None:
        nonlocal tried
        tried += 1
        size = {"batch_size": shape.batch_size, "seq_len": shape.seq_len}
        try:
            assert_fits_memory(config, llama, budget="24GiB", advise=False, **setting, **size)
        except LoraHealthError:
            found[:] = [(config, shape)]
            seen.setdefault(f"{config} {shape}", time.process_time() - worked)
            raise

    started, worked = time.perf_counter(), time.process_time()
    with suppress(LoraHealthError):
        fits()
    shrunk = seen[f"{found[0][0]} {found[0][1]}"] if found else 0.0  # it is run once more at the end
    worked, seconds = time.process_time() - worked, time.perf_counter() - started
    smallest = f"r={found[0][0].r}, {found[0][0].target_modules}, {found[0][1]}" if found else "none"
    return {
        "search": name,
        "cpu_seconds_until_smallest": round(shrunk, 1),
        "cpu_seconds": round(worked, 1),
        "seconds": round(seconds, 1),
        "tried": tried,
        "smallest": smallest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--searches", action="store_true", help="nothing but the searches")
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    path: Path | None = options.json
    result: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    result |= {"search": [], "versions": versions(), "python": platform.python_version()}
    for row in all_searches(options.starts):
        result["search"].append(row)
        write(result, path)
    if not options.searches:
        write(result | drawn(options.draws), path)


def write(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def versions() -> dict[str, str]:
    return {m.__name__: m.__version__ for m in (hypothesis, peft, transformers, torch)}


def all_searches(starts: int) -> Iterator[dict[str, Any]]:
    print(
        "| search on 24 GiB | CPU until the smallest, s | CPU, s | s | settings tried | smallest that does not fit |"
    )
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for name, start in ((name, start) for name in SEARCHES for start in range(starts)):
        row = search(name, start)
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
        yield row


def drawn(number: int) -> dict[str, Any]:
    """What draws cost, and how many are as they should be."""
    costs = {
        "lora_configs": cost(lora_configs(LlamaConfig()), 500),
        "lora_models": cost(lora_models(), 100),
        "adapter_folders": cost(adapter_folders(), 100),
    }
    print("\n| draw | median, ms | 90th percentile, ms |\n| --- | ---: | ---: |")
    for name, row in costs.items():
        print(f"| `{name}` | {row['median_ms']} | {row['p90_ms']} |")
    saved = folders(number)
    hurt = sum(saved["damaged"].values())
    print("\n| whole folders | with a finding | damaged folders | kinds of damage | missed |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| {saved['whole']} | {len(saved['not_whole'])} | {hurt} | {len(saved['damaged'])} | {len(saved['missed'])} |"
    )
    print(
        "\n| base | sound draws | not sound | faulty draws | missed |\n| --- | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    bases = []
    for name in NAMES:
        row = judged(name, number)
        bases.append(row)
        counts = (row["sound"], len(row["not_sound"]), row["faulty"], len(row["missed"]))
        print(f"| {name} | {' | '.join(map(str, counts))} |", flush=True)
    return {"costs": costs, "folders": saved, "bases": bases}


if __name__ == "__main__":
    main()
