"""Checks thousands of hostile adapter folders: no exception, no long wait, no large memory, nothing executed.

    python benchmarks/checkpoint_fuzz.py [--folders 20000] [--with-base 20] [--excess 4] [--seed 0]

One folder in ``--with-base`` is also compared with a base. One in ``--excess`` is sound but for asking too much:
patterns, long lists, many tensors, pickles that stand for gigabytes; of these every other one is compared. Time is that
of the processor, here and in the limited process, so that other work on the machine does not count; nothing of a folder
may reach the report that would do something to a terminal or a log. Writes benchmarks/results/checkpoint_fuzz.json.
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
    parser.add_argument("--excess", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from pytest_lora import Expect
    from pytest_lora.bases.examples.models import BASES
    from pytest_lora.checks.checkpoint import checkpoint_base, judge_checkpoint
    from pytest_lora.inspection.limited.process import limited
    from tests.checkpoint.damage import asking_too_much, damaged
    from tests.namespace import Namespace
    from tests.test_cleaning import is_harmless

    def processor_seconds() -> float:
        """Of this process, and of the limited one that it keeps or has waited for."""
        here = time.process_time()
        child = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = limited._process
        kept = 0.0
        if process is not None:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            kept = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return here + child.ru_utime + child.ru_stime + kept

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
        silent = with_base = 0
        longest = 0.0
        failures: list[dict[str, object]] = []
        began = time.perf_counter()
        for number in range(options.folders):
            seed = options.seed * 10_000_000 + number
            target = Path(place, "damaged")
            excess = number % options.excess == 0
            make = asking_too_much if excess else damaged
            kinds = make(adapters[number % len(adapters)], target, seed)
            compared = base if number % (2 * options.excess if excess else options.with_base) == 0 else None
            with_base += compared is not None
            start, on_the_clock = processor_seconds(), time.perf_counter()
            try:
                report = judge_checkpoint(target, compared, Expect(read_pickle=excess))
                json.loads(report.to_json())
                if not is_harmless(str(report)):
                    raise AssertionError(f"it is said raw: {str(report)[:500]!r}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    break  # the result says how many there were
                failures.append({"seed": seed, "kinds": kinds, "error": traceback.format_exc()[-1500:]})
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
                continue
            took = processor_seconds() - start
            longest = max(longest, time.perf_counter() - on_the_clock)
            for kind in kinds or ("nothing",):
                seconds[kind].append(took)
            slowest = max(slowest, (took, seed))
            findings.update({finding.code for finding in report.findings})
            silent += not report.findings
            if Path("EXECUTED").exists() or Path(target, "EXECUTED").exists():
                raise SystemExit(f"seed {seed}: something was executed")
        result = {
            "folders": number + 1,
            "with_base": with_base,
            "unhandled_exceptions": len(failures),
            "slowest_s": round(slowest[0], 3),
            "slowest_on_the_clock_s": round(longest, 3),
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
