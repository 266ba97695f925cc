"""What a draw costs, and whether what is drawn is what it should be.

``python benchmarks/strategies.py [--draws N] [--json PATH]`` times draws of ``lora_configs`` (Llama-2-7B without
weights) and of ``lora_models``, then draws N configurations, sound and faulty, on each of six architectures, and
judges them with ``check_config`` and ``check_model``. It prints Markdown tables.
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
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import LlamaConfig

from pytest_lora import Report, check_config, check_model
from pytest_lora.strategies import lora_configs, lora_models, misconfigured_lora_configs
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    costs = {
        "lora_configs": cost(lora_configs(LlamaConfig()), 500),
        "lora_models": cost(lora_models(), 100),
    }
    print("| draw | median, ms | 90th percentile, ms |\n| --- | ---: | ---: |")
    for name, row in costs.items():
        print(f"| `{name}` | {row['median_ms']} | {row['p90_ms']} |")
    print(
        "\n| base | sound draws | not sound | faulty draws | missed |\n| --- | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    bases = []
    for name in NAMES:
        row = judged(name, options.draws)
        bases.append(row)
        counts = (row["sound"], len(row["not_sound"]), row["faulty"], len(row["missed"]))
        print(f"| {name} | {' | '.join(map(str, counts))} |", flush=True)
    versions = {m.__name__: m.__version__ for m in (peft, transformers, torch)}
    result = {"costs": costs, "bases": bases, "versions": versions, "python": platform.python_version()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
