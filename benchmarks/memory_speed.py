"""Time of memory estimates: the first of a base, and further ones with other rank, batch and sequence.

    python benchmarks/memory_speed.py [--json benchmarks/results/memory_speed.json]

Each first estimate is made in a process of its own, imports aside; rates are medians over rounds, all in seconds of the
processor, so that what else runs does not count. The allocator's replay is compiled where numba is installed: what
loading it takes, and compiling it with no cache, has its own figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "7B": {},  # the defaults of LlamaConfig
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
FIRST_BUDGET = 2.0
ALLOCATED_BUDGET = 1000
RESERVED_BUDGET = 20


def rate(call: Any, points: list[tuple[int, int, int]]) -> float:
    start = time.process_time()
    for point in points:
        call(*point)
    return len(points) / (time.process_time() - start)


def measured(shape: str, rounds: int) -> dict[str, float]:
    from peft import LoraConfig
    from transformers import LlamaConfig

    import pytest_lora.memory.estimate as memory
    from pytest_lora.inspection.memory import predictor

    importlib.import_module("bitsandbytes")
    base = LlamaConfig(**SHAPES[shape])
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    setting: dict[str, Any] = {"quantization": "nf4", "gradient_checkpointing": True}
    start = time.process_time()
    memory.estimate_memory(config, base, batch_size=4, seq_len=512, **setting)
    first = time.process_time() - start

    step = memory.step_memory(config, base, **setting)
    start = time.process_time()
    for batch_size in range(2, 10):
        step.peak_allocated(batch_size, 300)
    fitting = time.process_time() - start

    pick = random.Random(0)
    points = [(pick.randint(2, 16), pick.randint(16, 8192), pick.randint(2, 256)) for _ in range(1000)]

    allocated = [rate(step.peak_allocated, points) for _ in range(rounds)]
    rate(step.peak_reserved, points[: predictor.COMPILE_AFTER + 1])
    reserved = [rate(step.peak_reserved, points[:20]) for _ in range(rounds)]
    whole = [rate(step.estimate, points[:20]) for _ in range(rounds)]
    predictor.fastest_replay = lambda: predictor.plainly_replayed
    plain = [rate(step.peak_reserved, points[:20]) for _ in range(rounds)]
    return {
        "first_seconds": first,
        "fitting_seconds": fitting,
        "allocated_per_second": statistics.median(allocated),
        "reserved_per_second": statistics.median(reserved),
        "estimates_per_second": statistics.median(whole),
        "reserved_per_second_without_numba": statistics.median(plain),
    }


LOADING = """
import time
from pytest_lora.inspection.memory.cuda_allocator import fastest_replay
start = time.process_time()
fastest_replay()
print(time.process_time() - start)
"""


def seconds_to_load(folder: str) -> float:
    """Seconds until the compiled replay is there, numba's import among them, with its cache in a folder."""
    command = [sys.executable, "-c", LOADING]
    environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(output)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--shape", choices=SHAPES, help="measure one shape in this process")
    chosen = arguments.parse_args()
    if chosen.shape:
        print(json.dumps(measured(chosen.shape, chosen.rounds)))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as empty:
        cold = seconds_to_load(empty)
        compiling = {"seconds_without_cache": cold, "seconds_with_cache": seconds_to_load(empty)}
    print(
        f"the replay is compiled in {cold:.1f} s once, and loaded in {compiling['seconds_with_cache']:.1f} s"
    )
    for shape in SHAPES:
        command = [sys.executable, __file__, "--shape", shape, "--rounds", str(chosen.rounds)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = rows[shape] = json.loads(output.splitlines()[-1])
        print(
            f"{shape:4s} first {row['first_seconds']:.2f} s (bound {FIRST_BUDGET:g}), "
            f"fit {row['fitting_seconds']:.2f} s once, then {row['allocated_per_second']:,.0f} allocated peaks "
            f"a second (bound {ALLOCATED_BUDGET:,}), {row['reserved_per_second']:.0f} reserved "
            f"(bound {RESERVED_BUDGET}; {row['reserved_per_second_without_numba']:.0f} without numba), "
            f"{row['estimates_per_second']:.0f} whole estimates (bound {RESERVED_BUDGET})"
        )
    if chosen.json:
        names = ("torch", "transformers", "peft", "bitsandbytes", "numba")
        result = {
            "versions": {n: version(n) for n in names},
            "python": platform.python_version(),
            "compiling": compiling,
            "rows": rows,
        }
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
