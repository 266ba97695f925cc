"""Checks an adapter of 1 GiB: peak memory and CPU time of the process, beside those for an adapter of 1 MiB.

    python benchmarks/large_adapter.py

Both are written here, of 64 modules in float32, every value a number. Writes benchmarks/results/large_adapter.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent

MODULES = 64
MIB = 2**20

CHECK = """
import sys, time
from pytest_lora import check_checkpoint
start = time.process_time()
report = check_checkpoint(sys.argv[1])
took = time.process_time() - start
assert not report.findings, report
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) / 1024, took, "torch" in sys.modules)
"""


def save(folder: Path, rank: int, width: int) -> int:
    """Write an adapter of square modules; returns the bytes of its tensors."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    values = numpy.random.default_rng(0).standard_normal(rank * width, dtype=numpy.float32).tobytes()
    header, end = {}, 0
    for layer in range(MODULES):
        for factor, shape in (("lora_A", [rank, width]), ("lora_B", [width, rank])):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{factor}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + len(values)]}
            end += len(values)
    text = json.dumps(header).encode()
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in header:
            file.write(values)
    return end


def check(folder: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(folder)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, seconds, imports_torch = done.stdout.split()
    return {
        "peak_mib": round(float(peak), 1),
        "cpu_s": round(float(seconds), 2),
        "imports_torch": imports_torch == "True",
    }


def main() -> None:
    result: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, rank, width in (("small", 2, 1024), ("large", 512, 4096)):
            size = save(Path(scratch, name), rank, width)
            result[name] = {"tensors_mib": size // MIB, **check(Path(scratch, name))}
    print(json.dumps(result, indent=1))
    (REPOSITORY / "benchmarks/results/large_adapter.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
