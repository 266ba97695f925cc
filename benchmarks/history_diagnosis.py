"""How often ``diagnose_history`` errs: false alarms on healthy curves, misses on faulty ones.

``python benchmarks/history_diagnosis.py [--curves 500] [--json PATH] [--seed 0]`` draws curves of every kind in
several shapes and lengths and prints how many were given which code. A false alarm is a warning or an error on
a healthy curve; infos are counted apart. A miss is a faulty curve without the code that is right for it.

Their noise is that of the real runs in ``results/history_runs.json``, which ``history_runs.py`` trained: for
each batch size the size of the noise as a function of the loss, and stretches of the standardized noise itself,
with its tails and its autocorrelation. The second table is about these real runs, untouched.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

from pytest_lora import Report, diagnose_history

RESULTS = Path(__file__).parent / "results"
LENGTHS = (12, 20, 40, 100, 300, 1000)
STRETCH = 8
WINDOW = 15


@dataclass(frozen=True)
class Noise:
    """Noise at one batch size: relative size ``exp(offset) * loss ** power``, and how it goes."""

    offset: float
    power: float
    standardized: tuple[float, ...]

    def size(self, loss: float) -> float:
        return math.exp(self.offset) * max(loss, 0.05) ** self.power

    def draw(self, count: int, rng: random.Random) -> list[float]:
        drawn: list[float] = []
        while len(drawn) < count:
            start = rng.randrange(len(self.standardized) - STRETCH)
            drawn += self.standardized[start : start + STRETCH]
        return drawn[:count]

    def on(self, trend: Sequence[float], rng: random.Random, louder: float = 1.0) -> list[float]:
        """The trend with noise; no loss gets below a fiftieth of its trend."""
        noise = self.draw(len(trend), rng)
        return [y * max(0.02, 1 + louder * self.size(y) * z) for y, z in zip(trend, noise, strict=True)]


def residuals(losses: Sequence[float]) -> list[tuple[float, float]]:
    """Trend and deviation from it in shares of it, at every loss that has neighbours on both sides."""
    half = WINDOW // 2
    found = []
    for i in range(half, len(losses) - half):
        near = losses[i - half : i + half + 1]
        trend = fmean(near)
        found.append((trend, (losses[i] - trend) / trend / math.sqrt(1 - 1 / WINDOW)))
    return found


def measure(runs: list[dict[str, Any]]) -> dict[int, Noise]:
    """The noise of the healthy and the flat runs, by batch size."""
    found = {}
    for size in sorted({run["batch_size"] for run in runs}):
        series = [
            residuals(r["losses"])
            for r in runs
            if r["batch_size"] == size and r["kind"] in ("healthy", "flat")
        ]
        pairs = sorted(pair for one in series for pair in one)
        bins = [pairs[i : i + 40] for i in range(0, len(pairs) - 39, 40)]
        x = [math.log(fmean(p[0] for p in one)) for one in bins]
        y = [math.log(pstdev(p[1] for p in one)) for one in bins]
        power = sum((a - fmean(x)) * (b - fmean(y)) for a, b in zip(x, y, strict=True)) / sum(
            (a - fmean(x)) ** 2 for a in x
        )
        shape = Noise(fmean(y) - power * fmean(x), power, ())
        standardized = tuple(d / shape.size(t) for one in series for t, d in one)
        found[size] = Noise(shape.offset, power, standardized)
    return found


def autocorrelation(values: Sequence[float], lag: int = 1) -> float:
    centre = fmean(values)
    rest = [v - centre for v in values]
    return sum(a * b for a, b in zip(rest, rest[lag:], strict=False)) / sum(r * r for r in rest)


@dataclass
class Draw:
    """What a kind draws its curve from."""

    rng: random.Random
    noises: dict[int, Noise]

    def noise(self, *sizes: int) -> Noise:
        return self.noises[self.rng.choice(sizes or tuple(self.noises))]

    def length(self, least: int = 0, most: int = 10**9) -> int:
        return self.rng.choice([n for n in LENGTHS if least <= n <= most])

    def start(self) -> float:
        return math.exp(self.rng.uniform(math.log(0.8), math.log(6)))


Arguments = dict[str, Any]


def falling(d: Draw, count: int, start: float, share: float) -> list[float]:
    """A trend that falls by ``share`` of its start in one of the shapes that real runs have."""
    x = [i / count for i in range(count)]
    speed = d.rng.uniform(2, 12)
    warm = d.rng.uniform(0.0, 0.1)
    shapes: tuple[Callable[[float], float], ...] = (
        lambda t: (1 - math.exp(-speed * t)) / (1 - math.exp(-speed)),
        lambda t: 1 - (1 + 20 * t) ** (-speed / 8),
        lambda t: 0.6 * min(1.0, t / 0.05) + 0.4 * t,
        lambda t: max(0.0, (t - warm) / (1 - warm)) ** 0.5,
        lambda t: 0.5 * (1 - math.cos(math.pi * t)),
        lambda t: t,
    )
    shape = d.rng.choice(shapes)
    return [start * (1 - share * shape(t)) for t in x]


def healthy_falling(d: Draw) -> Arguments:
    count = d.length()
    trend = falling(d, count, d.start(), d.rng.uniform(0.3, 0.97))
    return {"train_losses": d.noise().on(trend, d.rng), "total_steps": _planned(d, count)}


def healthy_small_fall(d: Draw) -> Arguments:
    count = d.length(40)
    trend = falling(d, count, d.start(), d.rng.uniform(0.1, 0.25))
    return {"train_losses": d.noise().on(trend, d.rng), "total_steps": _planned(d, count)}


def healthy_noisy(d: Draw) -> Arguments:
    count = d.length()
    trend = falling(d, count, d.start(), d.rng.uniform(0.3, 0.9))
    losses = d.noise(1, 2).on(trend, d.rng, louder=d.rng.uniform(1.5, 2.5))
    for _ in range(d.rng.randrange(max(2, count // 30))):
        losses[d.rng.randrange(count)] *= d.rng.uniform(1.5, 4)
    return {"train_losses": losses}


def healthy_converged(d: Draw) -> Arguments:
    count = d.length()
    level = math.exp(d.rng.uniform(math.log(0.001), math.log(0.06)))
    trend = falling(d, count, level, d.rng.uniform(0.0, 0.8))
    return {"train_losses": d.noise().on(trend, d.rng), "total_steps": _planned(d, count)}


def healthy_short(d: Draw) -> Arguments:
    count = d.rng.randint(3, 9)
    trend = falling(d, count, d.start(), d.rng.uniform(0.02, 0.8))
    return {"train_losses": d.noise().on(trend, d.rng)}


def healthy_few_batches(d: Draw) -> Arguments:
    count, batches = d.length(), d.rng.randint(2, 8)
    trend = falling(d, count, d.start(), d.rng.uniform(0.3, 0.97))
    offsets = d.noise().on([1.0] * batches, d.rng)
    jitter = [1 + d.rng.gauss(0, 0.005) for _ in range(count)]
    return {"train_losses": [y * offsets[i % batches] * jitter[i] for i, y in enumerate(trend)]}


def healthy_with_evaluation(d: Draw) -> Arguments:
    count, evaluations = d.length(40), d.rng.randint(3, 20)
    start, share, gap = d.start(), d.rng.uniform(0.3, 0.9), d.rng.uniform(0.0, 0.3)
    trend = falling(d, count, start, share)
    spread = d.rng.uniform(0, 0.012)
    evals = [trend[count * (i + 1) // evaluations - 1] * (1 - gap) + gap * start for i in range(evaluations)]
    return {
        "train_losses": d.noise().on(trend, d.rng),
        "eval_losses": [e * (1 + d.rng.gauss(0, spread)) for e in evals],
    }


def plateau(d: Draw) -> Arguments:
    """Clear: the noise leaves the means of the two halves known to 1.5 % of the loss."""
    while True:
        count, start, noise = d.length(100), d.start(), d.noise()
        if 2 * noise.size(start) < 0.015 * math.sqrt(count):
            return _plateau(d, count, start, noise)


def plateau_in_noise(d: Draw) -> Arguments:
    """Unclear: a fall of some percent would drown."""
    while True:
        count, start, noise = d.length(40), d.start(), d.noise()
        if 2 * noise.size(start) > 0.015 * math.sqrt(count):
            return _plateau(d, count, start, noise)


def _plateau(d: Draw, count: int, start: float, noise: Noise) -> Arguments:
    trend = falling(d, count, start, d.rng.uniform(-0.01, 0.02))
    planned = round(count / d.rng.uniform(0.15, 0.5)) if d.rng.random() < 0.7 else None
    return {"train_losses": noise.on(trend, d.rng), "total_steps": planned}


def swinging(d: Draw) -> Arguments:
    """Clear: the swings are eight times as high as the noise."""
    count, start, noise = d.length(40), d.start(), d.noise()
    while noise.size(start) * 8 > 0.6:
        start, noise = d.start(), d.noise()
    base = falling(d, count, start, d.rng.uniform(0.0, 0.5))
    period, depth = d.rng.uniform(8, count / 4), d.rng.uniform(0.6, 1.2)
    trend = [
        max(0.3 * y, y + depth * start * math.sin(2 * math.pi * i / period) / 2) for i, y in enumerate(base)
    ]
    return {"train_losses": noise.on(trend, d.rng)}


def alternating(d: Draw) -> Arguments:
    count = d.length(40)
    trend = falling(d, count, d.start(), d.rng.uniform(0.0, 0.4))
    depth, growth = d.rng.uniform(0.35, 0.6), d.rng.uniform(5, 20)
    flips = [(-1) ** i * depth * (1 - math.exp(-i / growth)) * d.rng.uniform(0.6, 1.4) for i in range(count)]
    trend = [y * (1 + f) for y, f in zip(trend, flips, strict=True)]
    return {"train_losses": d.noise(2, 4, 8).on(trend, d.rng)}


def blown_up(d: Draw) -> Arguments:
    count = d.length(40)
    trend = falling(d, count, d.start(), d.rng.uniform(0.1, 0.6))
    at, height, decay = d.rng.randint(2, count // 3), d.rng.uniform(1.2, 4), d.rng.uniform(3, 10)
    for i in range(at, count):
        trend[i] += height * trend[0] * math.exp(-(i - at) / decay)
    return {"train_losses": d.noise().on(trend, d.rng)}


def diverging(d: Draw) -> Arguments:
    """Clear: the rise is twelve times the error of a level."""
    while True:
        drawn, clearness = _diverging(d)
        if clearness > 12:
            return drawn


def diverging_in_noise(d: Draw) -> Arguments:
    """Unclear: few losses, much noise, or a small rise."""
    while True:
        drawn, clearness = _diverging(d)
        if clearness <= 12:
            return drawn


def _diverging(d: Draw) -> tuple[Arguments, float]:
    count, start, noise = d.length(20), d.start(), d.noise()
    share = d.rng.uniform(0.25, 0.8)
    turn = d.rng.uniform(0.2, 0.6)
    low, final = start * (1 - share), start * d.rng.uniform(1.0, 3.0)
    width = d.rng.uniform(0.02, 0.15)
    trend = [
        start + (low - start) * min(1.0, t / turn)
        if t < turn
        else low + (final - low) * (1 - math.exp(-(t - turn) / width))
        for t in (i / count for i in range(count))
    ]
    error = 1.25 * noise.size(final) * final / math.sqrt(max(3, count // 20))
    return {"train_losses": noise.on(trend, d.rng)}, (final - low) / error


def diverging_at_once(d: Draw) -> Arguments:
    count, start = d.rng.choice((6, 8, *LENGTHS)), d.start()
    height, speed = d.rng.uniform(1.5, 5), d.rng.uniform(4, 10)
    trend = [start * (1 + height * (1 - math.exp(-speed * i / count))) for i in range(count)]
    return {"train_losses": d.noise().on(trend, d.rng)}


def overfitting(d: Draw) -> Arguments:
    count, evaluations, start = d.length(40), d.rng.randint(5, 20), d.start()
    trend = falling(d, count, start, d.rng.uniform(0.85, 0.99))
    best, rise = d.rng.uniform(0.2, 0.6), d.rng.uniform(0.12, 0.8)
    level = start * d.rng.uniform(0.3, 0.7)
    evals = []
    for i in range(evaluations):
        t = (i + 1) / evaluations
        shape = (
            level + (start - level) * (1 - t / best) ** 2
            if t < best
            else level * (1 + rise * (t - best) / (1 - best))
        )
        evals.append(shape * (1 + d.rng.gauss(0, 0.01)))
    return {"train_losses": d.noise().on(trend, d.rng), "eval_losses": evals}


def not_finite(d: Draw) -> Arguments:
    losses = healthy_falling(d)["train_losses"]
    losses[d.rng.randrange(len(losses)) :] = [d.rng.choice((math.nan, math.inf))] * 3
    return {"train_losses": losses}


def zeroed(d: Draw) -> Arguments:
    losses = healthy_falling(d)["train_losses"]
    at = d.rng.randrange(len(losses) - 1)
    return {"train_losses": [*losses[:at], *[0.0] * (len(losses) - at)]}


def unmoved(d: Draw) -> Arguments:
    count, batches = max(12, d.length()), d.rng.choice((1, 1, 2, 4))
    offsets = d.noise().on([d.start()] * batches, d.rng)
    return {"train_losses": [offsets[i % batches] for i in range(count)]}


def _planned(d: Draw, count: int) -> int | None:
    return d.rng.choice((None, count, 2 * count, 5 * count))


HEALTHY = (
    healthy_falling,
    healthy_small_fall,
    healthy_noisy,
    healthy_converged,
    healthy_short,
    healthy_few_batches,
    healthy_with_evaluation,
)
FAULTY = {
    not_finite: "LORA340",
    zeroed: "LORA341",
    diverging: "LORA342",
    diverging_in_noise: "LORA342",
    diverging_at_once: "LORA342",
    unmoved: "LORA343",
    plateau: "LORA344",
    plateau_in_noise: "LORA344",
    swinging: "LORA345",
    alternating: "LORA345",
    blown_up: "LORA345",
    overfitting: "LORA346",
}
REAL = {
    "healthy": set[str](),
    "flat": {"LORA344"},
    "too_high": {"LORA342", "LORA345"},
    "overfitting": {"LORA346"},
}


def codes(report: Report) -> set[str]:
    """Codes that say something is wrong."""
    return {f.code for f in (*report.errors, *report.warnings)}


def judge_kind(
    kind: Callable[[Draw], Arguments], right: str | None, curves: int, draw: Draw
) -> dict[str, Any]:
    """Counts over the curves of one kind."""
    counts: Counter[str] = Counter()
    infos = missed = wrong = 0
    for _ in range(curves):
        report = diagnose_history(**kind(draw))
        found = codes(report)
        counts.update(found or {"none"})
        infos += bool(report.infos)
        missed += right is not None and right not in found
        wrong += bool(found - {right})
    return {
        "kind": kind.__name__,
        "right": right,
        "curves": curves,
        "codes": dict(sorted(counts.items())),
        "missed": missed / curves,
        "other_code": wrong / curves,
        "infos": infos / curves,
    }


def judge_real(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts on the real runs, whole."""
    rows = []
    for kind, right in REAL.items():
        own = [run for run in runs if run["kind"] == kind]
        verdicts = [
            codes(
                diagnose_history(
                    run["losses"], {int(s): v for s, v in run["evals"].items()} or None, total_steps=400
                )
            )
            for run in own
        ]
        counts = Counter(code for found in verdicts for code in found or {"none"})
        as_it_should = sum(bool(found & right) if right else not found for found in verdicts)
        rows.append(
            {"kind": kind, "runs": len(own), "right": as_it_should, "codes": dict(sorted(counts.items()))}
        )
    return rows


def describe(noises: dict[int, Noise]) -> list[dict[str, float]]:
    """The measured noise in figures."""
    return [
        {
            "batch_size": size,
            "relative_at_4": noise.size(4.0),
            "relative_at_1": noise.size(1.0),
            "relative_at_half": noise.size(0.5),
            "autocorrelation": autocorrelation(noise.standardized),
            "typical_to_deviation": median(map(abs, noise.standardized)) / pstdev(noise.standardized),
            "residuals": len(noise.standardized),
        }
        for size, noise in noises.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=int, default=500, help="curves of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "history_diagnosis.json", metavar="PATH")
    options = parser.parse_args()
    runs = json.loads((RESULTS / "history_runs.json").read_text(encoding="utf-8"))
    noises = measure(runs)
    rows = []
    print("| kind | right code | curves | false alarms or misses | other code too | infos | codes |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for kind, right in (*((k, None) for k in HEALTHY), *FAULTY.items()):
        draw = Draw(random.Random(f"{options.seed} {kind.__name__}"), noises)
        row = judge_kind(kind, right, options.curves, draw)
        rows.append(row)
        wrong = row["missed"] if right else row["other_code"]
        other = f"{row['other_code']:.1%}" if right else ""
        said = ", ".join(f"{code} {n}" for code, n in row["codes"].items())
        print(
            f"| {row['kind']} | {right or 'none'} | {row['curves']} | {wrong:.1%} | {other} "
            f"| {row['infos']:.1%} | {said} |"
        )
    real = judge_real(runs)
    print("\n| real runs | runs | judged right | codes |\n| --- | ---: | ---: | --- |")
    for row in real:
        said = ", ".join(f"{code} {n}" for code, n in row["codes"].items())
        print(f"| {row['kind']} | {row['runs']} | {row['right']} | {said} |")
    measured = describe(noises)
    print("\n| batch | noise at loss 4 | at 1 | at 0.5 | lag-1 autocorrelation |\n|" + " ---: |" * 5)
    for entry in measured:
        print(
            f"| {entry['batch_size']} | {entry['relative_at_4']:.1%} | {entry['relative_at_1']:.1%} "
            f"| {entry['relative_at_half']:.1%} | {entry['autocorrelation']:.2f} |"
        )
    result = {"seed": options.seed, "curves": rows, "real_runs": real, "noise": measured}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
