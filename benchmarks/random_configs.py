"""Random configurations on random bases, most of them wrong: does anything but the documented errors come?

``python benchmarks/random_configs.py [--number N] [--json PATH]`` judges N of them as the test suite judges a few: the
verdict without weights has to agree with what PEFT then does. The first disagreement ends it, with its seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import torch
import transformers

from tests.test_random_configs import MODELS, tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    outcomes = tally(range(1000, 1000 + options.number))
    result = {
        "bases": len(MODELS),
        **outcomes,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {m.__name__: m.__version__ for m in (peft, transformers, torch)},
        "python": platform.python_version(),
    }
    print("| bases | accepted by PEFT | refused by PEFT | disagreements | seconds |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| {len(MODELS)} | {outcomes['accepted']:,} | {outcomes['refused']:,} | 0 | {result['seconds']:,} |"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
