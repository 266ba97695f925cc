"""Does a journal lose anything when sweeps start together, or die in the middle of a write?

Pairs: two processes wait at a barrier and sweep with one new journal; in every second pair their settings differ.
Sweeps of one setting both have to finish with the numbers of an undisturbed sweep, and the journal has to open again
with every trial; of two settings one has to finish and the other to be refused.

Kills: a process is killed by SIGKILL in the middle of a write, after a random number of its bytes: of the first line,
or of any later one. The next sweep has to finish with the same numbers, and to run no trial again whose line was whole.

    python benchmarks/journal.py [--pairs 100] [--kills 30] [--out FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import signal
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_lora import SweepResult, TrialRow, rank_sweep
from pytest_lora.sweep import TrialPlan

RESULTS = Path(__file__).parent / "results" / "journal.json"
RANKS, SEEDS = (1, 2, 4), 2
FORK = multiprocessing.get_context("fork")


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(folder: str, model: nn.Module, plan: TrialPlan) -> list[float]:
    """A few steps; what was run is noted beside the journal."""
    with Path(folder, f"runs-{os.getpid()}").open("a") as file:
        file.write(f"{plan.rank} {plan.seed}\n")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for batch in torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(plan.seed)):
        loss = (model(batch) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        return -float((model(torch.ones(1, 8)) - 1).square().mean())


def sweep(folder: Path, epochs: int = 1) -> SweepResult:
    return rank_sweep(
        make_model,
        partial(train, str(folder)),
        evaluate,
        ranks=RANKS,
        seeds=SEEDS,
        epochs=epochs,
        config={"target_modules": ["0", "2"]},
        journal=folder / "sweep.jsonl",
        progress=False,
    )


def numbers(result: SweepResult) -> list[Any]:
    return [result.before, *((row.rank, row.seed, row.metric, row.losses) for row in result.trials)]


def started(barrier: Any, folder: Path, epochs: int, said: Any) -> None:
    torch.set_num_threads(1)
    barrier.wait()
    try:
        said.put(numbers(sweep(folder, epochs)))
    except ValueError as error:
        said.put(str(error))


def pair(folder: Path, differ: bool) -> str:
    """What went wrong with two sweeps at once; empty where nothing did."""
    barrier, said = FORK.Barrier(2), FORK.Queue()
    epochs = (1, 2 if differ else 1)
    both = [FORK.Process(target=started, args=(barrier, folder, each, said)) for each in epochs]
    for process in both:
        process.start()
    answers = [said.get(timeout=300) for _ in both]
    for process in both:
        process.join()
    finished = [answer for answer in answers if not isinstance(answer, str)]
    refused = [answer for answer in answers if isinstance(answer, str)]
    if differ:
        if len(refused) != 1 or "is of another sweep: epochs was" not in refused[0]:
            return f"refused: {refused}"
    elif refused or finished[0] != finished[1]:
        return f"refused: {refused}, or the numbers differ"
    lines = (folder / "sweep.jsonl").read_text().splitlines()
    if sum("format" in json.loads(line) for line in lines) != 1:
        return "more than one header"
    kept = {row.key for row in map(_row, lines[1:])}
    return "" if len(kept) == 1 + len(RANKS) * SEEDS else f"{len(kept)} kept"


def _row(line: str) -> TrialRow:
    entry = json.loads(line)
    row = TrialRow.from_dict(entry.get("trial") or entry["before"])
    return row if "trial" in entry else TrialRow(0, 0, 0)


def cut(folder: Path, at_write: int, share: float) -> None:
    """Sweep, and be killed at a write of a file in this folder, when a share of its bytes are written."""
    torch.set_num_threads(1)
    writes = iter(range(1000))

    class Cutting(io.FileIO):
        def write(self, data: Any) -> int:
            if next(writes) < at_write:
                return super().write(data)
            super().write(data[: int(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    opened = Path.open
    Path.open = lambda self, mode="r", *args, **kw: (
        Cutting(self, "r+") if mode == "r+b" else opened(self, mode, *args, **kw)
    )
    if at_write < 0:  # of the first line, between its bytes and its name

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = os.replace = die
    sweep(folder)


def kill(folder: Path, at_write: int, share: float, wanted: list[Any]) -> str:
    """What went wrong after a kill; empty where nothing did."""
    process = FORK.Process(target=cut, args=(folder, at_write, share))
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return f"was not killed: {process.exitcode}"
    journal = folder / "sweep.jsonl"
    whole = journal.read_bytes().count(b"\n") if journal.exists() else 0
    if whole != max(0, at_write + 1):
        return f"{whole} whole lines of {at_write + 1}"
    if numbers(sweep(folder)) != wanted:
        return "other numbers"
    runs = (folder / f"runs-{os.getpid()}").read_text().splitlines()
    # A line that was whole but for its end is kept, too.
    kept = max(0, at_write - 1) + (at_write > 0 and share == 1)
    return "" if len(runs) == len(RANKS) * SEEDS - kept else f"{len(runs)} trials were run again"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong: list[str] = []
    drawn = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "here")
        folder.mkdir()
        wanted = numbers(sweep(folder))
        for number in range(args.pairs):
            folder = Path(root, f"pair-{number}")
            folder.mkdir()
            if said := pair(folder, differ=number % 2 == 1):
                wrong.append(f"pair {number}: {said}")
        for number in range(args.kills):
            folder = Path(root, f"kill-{number}")
            folder.mkdir()
            at_write = drawn.randrange(-1, len(RANKS) * SEEDS + 1)
            if said := kill(folder, at_write, drawn.random(), wanted):
                wrong.append(f"kill {number} at write {at_write}: {said}")
    print(*wrong, sep="\n")
    print(f"{args.pairs} pairs and {args.kills} kills, {len(wrong)} went wrong")
    args.out.write_text(
        json.dumps({"pairs": args.pairs, "kills": args.kills, "wrong": wrong}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
