"""Checks thousands of damaged adapter folders: no exception, no long wait, no large memory, nothing executed.

    python benchmarks/checkpoint_fuzz.py [--folders 20000] [--with-base 20] [--seed 0]

One folder in ``--with-base`` is also compared with a base. Writes benchmarks/results/checkpoint_fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=20_000)
    parser.add_argument("--with-base", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from pytest_lora import Expect
    from pytest_lora.bases.examples.models import BASES
    from pytest_lora.checks.checkpoint import checkpoint_base, judge_checkpoint
    from tests.checkpoint.damage import damaged
    from tests.namespace import Namespace

    def sources(scratch: Path) -> list[Path]:
        names = Namespace(scratch)
        return [
            names.adapter(),
            names.adapter(use_dora=True, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 8}),
            names.adapter(modules_to_save=["lm_head"], target_modules=r".*\.(q|v)_proj"),
            names.adapter(target_modules=["q_proj", "embed_tokens"]),
            names.adapter(trainable_token_indices=[126, 127]),
        ]

    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        scratch = Path(place, "sources")
        scratch.mkdir()
        adapters = sources(scratch)
        base = checkpoint_base(BASES["base"]())
        for adapter in adapters:
            judge_checkpoint(adapter, base, Expect())
        before = peak_mib()
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        slowest: tuple[float, int] = (0.0, -1)
        findings: Counter[str] = Counter()
        silent = 0
        failures: list[dict[str, object]] = []
        began = time.perf_counter()
        for number in range(options.folders):
            seed = options.seed * 10_000_000 + number
            target = Path(place, "damaged")
            kinds = damaged(adapters[number % len(adapters)], target, seed)
            compared = base if number % options.with_base == 0 else None
            start = time.perf_counter()
            try:
                report = judge_checkpoint(target, compared, Expect())
                json.loads(report.to_json())
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures.append({"seed": seed, "kinds": kinds, "error": traceback.format_exc()[-1500:]})
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
                continue
            took = time.perf_counter() - start
            for kind in kinds or ("nothing",):
                seconds[kind].append(took)
            slowest = max(slowest, (took, seed))
            findings.update({finding.code for finding in report.findings})
            silent += not report.findings
            if Path("EXECUTED").exists() or Path(target, "EXECUTED").exists():
                raise SystemExit(f"seed {seed}: something was executed")
        result = {
            "folders": options.folders,
            "with_base": sum(1 for n in range(options.folders) if n % options.with_base == 0),
            "unhandled_exceptions": len(failures),
            "slowest_s": round(slowest[0], 3),
            "slowest_seed": slowest[1],
            "memory_growth_mib": round(peak_mib() - before, 1),
            "without_finding": silent,
            "wall_s": round(time.perf_counter() - began, 1),
            "kinds": {
                kind: {
                    "folders": len(times),
                    "median_ms": round(1000 * statistics.median(times), 2),
                    "slowest_ms": round(1000 * max(times), 1),
                }
                for kind, times in sorted(seconds.items())
            },
            "findings": dict(sorted(findings.items())),
            "failures": failures[:20],
        }
        os.chdir(REPOSITORY)
    print(json.dumps(result, indent=1))
    (REPOSITORY / "benchmarks/results/checkpoint_fuzz.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
