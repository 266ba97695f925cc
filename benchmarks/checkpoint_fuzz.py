"""Checks thousands of hostile adapter folders: no exception, no long wait, no large memory, nothing executed.

    python benchmarks/checkpoint_fuzz.py [--folders 20000] [--with-base 20] [--excess 4] [--kinds NAME ...] [--seed 0]
                                         [--numbers 0:5000] [--rows FILE ...] [--json FILE]

One folder in ``--with-base`` is also compared with a base. One in ``--excess`` is sound but for asking too much:
patterns, long lists, many tensors, pickles that stand for gigabytes (``--kinds`` picks some of them); of these every
other one is compared. Time is that of the processor, here and in the limited process, so that other work on the machine
does not count; nothing of a folder may reach the report that would do something to a terminal or a log.

What is found of each folder goes to the last of ``--rows``, and folders that stand there are not judged again: a run
that was ended goes on, and several that share the numbers are put together by one more with all their files.
Writes benchmarks/results/checkpoint_fuzz.json, or ``--json``.
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

Row = dict[str, Any]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def processor_seconds() -> float:
    """Of this process, and of the limited one that it keeps or has waited for."""
    from pytest_lora.inspection.limited import limited

    here = time.process_time()
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = limited._process
    kept = 0.0
    if process is not None:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        kept = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return here + child.ru_utime + child.ru_stime + kept


def sources(scratch: Path) -> list[Path]:
    """Sound adapters of several kinds."""
    from tests.namespace import Namespace

    names = Namespace(scratch)
    return [
        names.adapter(),
        names.adapter(use_dora=True, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 8}),
        names.adapter(modules_to_save=["lm_head"], target_modules=r".*\.(q|v)_proj"),
        names.adapter(target_modules=["q_proj", "embed_tokens"]),
        names.adapter(trainable_token_indices=[126, 127]),
    ]


def rows(options: argparse.Namespace, place: Path, wanted: list[int]) -> Iterator[Row]:
    """What is found of each of these folders, which are made one after another."""
    from pytest_lora import Expect
    from pytest_lora.bases.examples.models import BASES
    from pytest_lora.checks.checkpoint import checkpoint_base, judge_checkpoint
    from tests.checkpoint.damage import asking_too_much, damaged
    from tests.checkpoint.excess import EXCESSES
    from tests.test_cleaning import is_harmless

    scratch = place / "sources"
    scratch.mkdir()
    adapters = sources(scratch)
    base = checkpoint_base(BASES["base"]())
    for adapter in adapters:
        judge_checkpoint(adapter, base, Expect())
    before = peak_mib()
    target = place / "damaged"
    ways = [way for way in EXCESSES if not options.kinds or way.__name__ in options.kinds]
    for number in wanted:
        seed = options.seed * 10_000_000 + number
        source = adapters[number % len(adapters)]
        excess = number % options.excess == 0
        kinds = asking_too_much(source, target, seed, ways) if excess else damaged(source, target, seed)
        compared = base if number % (2 * options.excess if excess else options.with_base) == 0 else None
        row: Row = {"number": number, "kinds": kinds, "with_base": compared is not None}
        start, on_the_clock = processor_seconds(), time.perf_counter()
        try:
            report = judge_checkpoint(target, compared, Expect(read_pickle=excess))
            json.loads(report.to_json())
            if not is_harmless(str(report)):
                raise AssertionError(f"it is said raw: {str(report)[:500]!r}")
        except Exception as error:
            row["error"] = traceback.format_exc()[-1500:]
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        else:
            row["findings"] = sorted({finding.code for finding in report.findings})
        row["seconds"] = round(processor_seconds() - start, 4)
        row["on_the_clock"] = round(time.perf_counter() - on_the_clock, 4)
        row["growth_mib"] = round(peak_mib() - before, 1)
        if Path("EXECUTED").exists() or (target / "EXECUTED").exists():
            raise SystemExit(f"seed {seed}: something was executed")
        yield row


def summary(found: list[Row]) -> dict[str, Any]:
    """Counts and the slowest of all folders."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for row in found:
        for kind in row["kinds"] or ("nothing",):
            seconds[kind].append(row["seconds"])
    failures = [row for row in found if "error" in row]
    slowest = max(found, key=lambda row: row["seconds"])
    return {
        "folders": len(found),
        "with_base": sum(row["with_base"] for row in found),
        "unhandled_exceptions": len(failures),
        "slowest_s": round(slowest["seconds"], 3),
        "slowest_on_the_clock_s": round(max(row["on_the_clock"] for row in found), 3),
        "slowest_number": slowest["number"],
        "above_2_s": sum(row["seconds"] > 2 for row in found),
        "memory_growth_mib": max(row["growth_mib"] for row in found),
        "without_finding": sum(not row.get("findings", True) for row in found),
        "kinds": {
            kind: {
                "folders": len(times),
                "median_ms": round(1000 * statistics.median(times), 2),
                "slowest_ms": round(1000 * max(times), 1),
            }
            for kind, times in sorted(seconds.items())
        },
        "findings": dict(sorted(Counter(code for row in found for code in row.get("findings", ())).items())),
        "failures": failures[:20],
    }


def known(files: list[Path]) -> list[Row]:
    """What earlier runs found; the end of a run that was killed amid a line is left out."""
    found: dict[int, Row] = {}
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                found[row["number"]] = row
    return list(found.values())


def writer(files: list[Path]) -> Callable[[Row], object]:
    if not files:
        return lambda row: None
    out = files[-1].open("a", buffering=1)
    out.write("\n")  # after a line that was not ended
    return lambda row: out.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folders", type=int, default=20_000)
    parser.add_argument("--with-base", type=int, default=20)
    parser.add_argument("--excess", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numbers", help="FIRST:END, those of this run; all by default")
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks/results/checkpoint_fuzz.json")
    options = parser.parse_args()
    first, end = map(int, options.numbers.split(":")) if options.numbers else (0, options.folders)
    options.rows = [file.resolve() for file in options.rows]
    options.json = options.json.resolve()
    found = known(options.rows)
    done = {row["number"] for row in found}
    keep = writer(options.rows)
    wanted = [number for number in range(first, end) if number not in done]
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        with suppress(KeyboardInterrupt):  # the result says how many there were
            for row in rows(options, Path(place), wanted) if wanted else ():
                found.append(row)
                keep(row)
        os.chdir(REPOSITORY)
    result = summary(found)
    print(json.dumps(result, indent=1))
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
