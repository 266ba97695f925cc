"""The first check of a pytest session, without the imports of torch, transformers and PEFT.

``python benchmarks/first_check.py [--rounds N] [--json PATH]`` starts pytest N times on one test that imports these and
builds a small model with an adapter, and then times its first ``check_model`` and ``check_config`` in the process (CPU
time). Once with the bytecode that an installation has (compiled beforehand, as pip does), once with none, as where
``PYTHONDONTWRITEBYTECODE`` is set and nothing was compiled.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = 0.25

TEST = """
import time, warnings
import accelerate, bitsandbytes, peft, safetensors.torch, torch, transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=64, vocab_size=64)


def test_first():
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(SMALL), config)
    begun = time.process_time()
    from pytest_lora import check_config, check_model
    check_model(model)
    first = time.process_time() - begun
    begun = time.process_time()
    check_config(config, SMALL)
    second = time.process_time() - begun
    begun = time.process_time()
    check_model(model)
    print("MEASURED", first, second, time.process_time() - begun)
"""


def measured(package: Path, folder: Path) -> list[float]:
    """First check_model, first check_config after it, and check_model once more, in seconds of CPU."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "MEASURED" in line)
    return [float(word) for word in line.partition("MEASURED")[2].split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tests"
        folder.mkdir()
        (folder / "test_first.py").write_text(TEST)
        packages = {name: Path(scratch) / name for name in ("compiled", "nothing compiled")}
        for package in packages.values():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "pytest_lora", package / "pytest_lora", ignore=ignored)
        compileall.compile_dir(packages["compiled"], quiet=1)
        rounds: dict[str, list[list[float]]] = {name: [] for name in packages}
        for _ in range(options.rounds):
            for name, package in packages.items():
                rounds[name].append(measured(package, folder))
    result = {
        name: {
            label: round(statistics.median(column), 4)
            for label, column in zip(
                ("check_model", "then check_config", "again"), zip(*rows, strict=True), strict=True
            )
        }
        for name, rows in rounds.items()
    }
    result["bound"] = {"check_model": BOUND}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps({"rounds": options.rounds, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
