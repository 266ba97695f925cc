"""Lets libFuzzer damage saved adapters, led by the branches that it reaches in the code that reads and judges them.

    pip install atheris
    python benchmarks/checkpoint_coverage_fuzz.py [--runs 10000]

Half of the inputs stand for the configuration, half for the file of weights; the other file is sound. Ends at the
first exception, or at a folder that takes two seconds. Writes benchmarks/results/checkpoint_coverage_fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

FILES = ("adapter_config.json", "adapter_model.safetensors")
LONGEST_S = 2.0
LARGEST = 8192


def fuzz(place: Path, runs: int) -> None:
    """Run the fuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(
        include=["pytest_lora.inspection.checkpoint", "pytest_lora.facts", "pytest_lora.rules"]
    ):
        from pytest_lora import check_checkpoint

        check_checkpoint(place / "sound")
    sound = {name: (place / "sound" / name).read_bytes() for name in FILES}
    target = place / "damaged"
    target.mkdir()

    def one(data: bytes) -> None:
        chosen = FILES[data[0] % 2] if data else FILES[0]
        for name in FILES:
            (target / name).write_bytes(data[1:] if name == chosen else sound[name])
        start = time.perf_counter()
        json.loads(check_checkpoint(target).to_json())
        took = time.perf_counter() - start
        if took > LONGEST_S:
            raise TimeoutError(f"{took:.2f} s")

    corpus = str(place / "corpus")
    atheris.Setup([sys.argv[0], corpus, f"-runs={runs}", f"-max_len={LARGEST}", "-seed=1"], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.place:
        fuzz(options.place, options.runs)
        return

    from tests.namespace import Namespace

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "made").mkdir()
        (place / "corpus").mkdir()
        Namespace(place / "made").adapter(r=1).rename(place / "sound")
        for number, name in enumerate(FILES):
            content = (place / "sound" / name).read_bytes()
            assert len(content) < LARGEST
            (place / "corpus" / name).write_bytes(bytes([number]) + content)
        command = [sys.executable, __file__, "--runs", str(options.runs), "--place", scratch]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        log = done.stderr
    states = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)/", log)
    ended = re.search(r"Done (\d+) runs in (\d+) second", log)
    if done.returncode or not ended or not states:
        print(log[-4000:])
        raise SystemExit(f"ended with exit code {done.returncode}")
    result = {
        "folders": int(ended[1]),
        "unhandled_exceptions": 0,
        "wall_s": int(ended[2]),
        "branches_of_the_sound_files": int(states[0][0]),
        "branches": int(states[-1][0]),
        "inputs_kept": int(states[-1][1]),
    }
    print(json.dumps(result, indent=1))
    file = REPOSITORY / "benchmarks/results/checkpoint_coverage_fuzz.json"
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
