"""Collects and runs folders of 10, 100, 1,000 and 10,000 saved adapters; time and memory of each session.

    python benchmarks/adapter_items.py [--sizes 10 100 1000 10000] [--run-up-to 10000]

Sessions run in processes of their own, without other plugins. Of three sessions that collect (one above 1,000) the
fastest counts.
Writes benchmarks/results/adapter_items.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

SESSION = """
import sys, pytest
code = pytest.main(sys.argv[1:])
# ru_maxrss would be that of the process that started this one.
print("PEAK_KIB", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def session(place: Path, *arguments: str) -> dict[str, float]:
    """CPU seconds, wall seconds and peak memory of one pytest session."""
    command = [
        sys.executable, "-c", SESSION, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest",
        "--rootdir", str(place), "-c", os.devnull, *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 5):
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    peak = next(line for line in done.stdout.splitlines() if line.startswith("PEAK_KIB"))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu, "wall_s": wall, "peak_mib": int(peak.split()[1]) / 1024}


def least(place: Path, *arguments: str, tries: int = 3) -> dict[str, float]:
    """The session that took the least CPU time."""
    return min((session(place, *arguments) for _ in range(tries)), key=lambda found: found["cpu_s"])


def per_further(
    found: dict[str, float], size: int, rows: list[dict[str, float]], key: str, empty: dict[str, float]
) -> float:
    """Milliseconds for each adapter more than in the row before."""
    before = rows[-1] if rows else {"adapters": 0, key: empty["cpu_s"]}
    return round(1000 * (found["cpu_s"] - before[key]) / (size - before["adapters"]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--run-up-to", type=int, default=10_000)
    options = parser.parse_args()

    from tests.namespace import Namespace

    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, "project")
        made = Path(scratch, "made")
        folder = place / "adapters"
        folder.mkdir(parents=True)
        made.mkdir()
        source = Namespace(made).adapter()
        empty = least(place, "--collect-only", "-q", "--lora-adapters=adapters", "adapters")
        count = 0
        for size in options.sizes:
            while count < size:
                shutil.copytree(source, folder / f"{count:05d}")
                count += 1
            collected = least(
                place,
                "--collect-only",
                "-q",
                "--lora-adapters=adapters",
                "adapters",
                tries=1 if size > 1000 else 3,
            )
            row = {
                "adapters": size,
                "collect_cpu_s": round(collected["cpu_s"], 3),
                "collect_peak_mib": round(collected["peak_mib"], 1),
                "collect_ms_per_further": per_further(collected, size, rows, "collect_cpu_s", empty),
            }
            if size <= options.run_up_to:
                ran = session(place, "--lora-adapters=adapters", "adapters")
                row["run_cpu_s"] = round(ran["cpu_s"], 3)
                row["run_ms_per_further"] = per_further(ran, size, rows, "run_cpu_s", empty)
            rows.append(row)
            print(row, flush=True)
    result = {
        "empty_session_cpu_s": round(empty["cpu_s"], 3),
        "empty_session_peak_mib": round(empty["peak_mib"], 1),
        "items_per_adapter": 6,
        "rows": rows,
    }
    (REPOSITORY / "benchmarks/results/adapter_items.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
