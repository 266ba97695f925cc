"""Wrong values for every parameter of every public function: refused by name, before any work, or meaningful.

    python benchmarks/wrong_calls.py [--calls 3000] [--seed 0] [--json FILE]

The pool and the judgement are those of ``tests/wrong_calls.py``; 0 calls are all of them, some 29,000.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

KINDS = ("refused", "succeeded", "found", "raw", "unnamed", "late")


def main() -> int:
    from tests.wrong_calls import outcome, targets, wrong_calls

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=3000, help="how many; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    calls = wrong_calls()
    random.Random(options.seed).shuffle(calls)
    chosen = calls[: options.calls or None]
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = (0.0, "")
    for call in chosen:
        began = time.process_time()
        one = outcome(call)
        slowest = max(slowest, (time.process_time() - began, str(call)))
        kinds[one.kind] += 1
        if not one.is_right:
            wrong.append(f"{one.kind}: {call}: {one.error}")
            print(wrong[-1], flush=True)
    counts = {kind: kinds[kind] for kind in KINDS}
    print(f"{len(chosen):,} of {len(calls):,} wrong calls of {len(targets())} functions: {counts}")
    print(f"slowest: {slowest[0]:.1f} s of processor time, {slowest[1]}")
    if options.json:
        known = {"python": platform.python_version(), "torch": version("torch"), "peft": version("peft")}
        found = {"seed": options.seed, **known, "calls": len(chosen), "functions": len(targets()), **counts}
        options.json.write_text(json.dumps({**found, "wrong": wrong}, indent=2) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
