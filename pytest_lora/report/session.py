"""A session of tests as a report shows it, whoever ran it: plain data, and in words what its GPU tests took."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from pytest_lora.facts.numbers import format_bytes
from pytest_lora.findings import SEVERITIES, Finding, Report
from pytest_lora.values import json_text

State = Literal["running", "finished", "interrupted", "crashed"]
"""Whether all tests ran: a report that says "running" is of a session that nobody ended, or that still goes on."""

Verdict = Literal["error", "warning", "healthy", "not judged"]

FORMAT = 1
"""Version of the JSON that a session is written as; another one where a field changes its meaning."""

GPU_COLUMNS = ("test", "devices", "peak", "limit", "predicted", "seconds")
GPU_TEXT_COLUMNS = 2
"""Those of them that are no numbers."""

_UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What was measured of a test on a GPU, in bytes and seconds; None where it is not known.

    Attributes:
        devices: Where it ran; none if it did not.
        peak_bytes: The most that was allocated at a time on one device.
        limit_bytes: What it may take.
        predicted_bytes: What the estimate says.
        left_bytes: What it left allocated.
        seconds: Of the call.
        skipped: Why it did not run.
        broken_by: The test that broke CUDA before it.
    """

    devices: tuple[str, ...]
    peak_bytes: int | None
    limit_bytes: int | None
    predicted_bytes: int | None
    left_bytes: int | None
    seconds: float | None
    skipped: str | None
    broken_by: str | None


@dataclass(frozen=True, slots=True)
class RanTest:
    """A test that has something to show: it judged a LoRA set-up, used a GPU, or failed.

    Attributes:
        nodeid: Its id.
        outcome: What pytest says: ``"passed"``, ``"failed"``, ``"error"``, ``"skipped"``, ``"xfailed"``, ``"xpassed"``.
        seconds: Set-up, call and teardown together.
        file: Its file, relative to the root of the session.
        line: The line that failed or else where the test begins, from 1; None where unknown.
        message: The first line of a failure; empty where there is none.
        reports: What it judged.
        gpu: What was measured on a GPU; None elsewhere.
    """

    nodeid: str
    outcome: str
    seconds: float
    file: str
    line: int | None
    message: str
    reports: tuple[Report, ...]
    gpu: GpuUse | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings of its reports."""
        return tuple(finding for report in self.reports for finding in report.findings)

    @property
    def verdict(self) -> Verdict:
        """The gravest finding, infos aside."""
        if not self.reports:
            return "not judged"
        grave = {finding.severity for finding in self.findings}
        return "error" if "error" in grave else "warning" if "warning" in grave else "healthy"

    @property
    def failed(self) -> bool:
        """Whether it, its set-up or its teardown failed."""
        return self.outcome in ("failed", "error")

    @property
    def decisive(self) -> tuple[Finding, ...]:
        """The findings that say why it failed: errors, and warnings where these are made errors."""
        if not self.failed:
            return ()
        return tuple(f for f in self.findings if f.severity == "error" or f"[{f.code}]" in self.message)

    @property
    def fails_otherwise(self) -> bool:
        """Whether it failed, and none of its findings says why."""
        return self.failed and not self.decisive


@dataclass(frozen=True, slots=True)
class Session:
    """One run of pytest.

    Attributes:
        name: What was tested: the folder's name.
        state: How it ended.
        problem: What ended it early; empty if nothing did.
        started: When, as ISO 8601 with the offset of the time zone.
        seconds: How long it took so far.
        collected: How many tests there were to run.
        counts: How many ended in which outcome.
        folder: Where pytest was called.
        command: What was called there.
        versions: Names and versions of what ran.
        seeds: Names and values of the seeds that are known.
        tests: The tests that have something to show, in the order in which they ended.
        root: The folder that files of tests are relative to.
        top: The top of the sources: the checkout in which that folder is.
    """

    name: str
    state: State
    problem: str
    started: str
    seconds: float
    collected: int
    counts: tuple[tuple[str, int], ...]
    folder: str
    command: str
    versions: tuple[tuple[str, str], ...]
    seeds: tuple[tuple[str, str], ...]
    tests: tuple[RanTest, ...]
    root: str = ""
    top: str = ""

    @property
    def judged(self) -> tuple[RanTest, ...]:
        """The tests that judged a LoRA set-up, the gravest first."""
        order = (*SEVERITIES[:2], "healthy")
        judged = [test for test in self.tests if test.reports]
        return tuple(sorted(judged, key=lambda test: (order.index(test.verdict), test.nodeid)))

    @property
    def done(self) -> int:
        """How many tests ended."""
        return sum(number for _, number in self.counts)

    def with_verdict(self, verdict: Verdict) -> int:
        """How many tests have this verdict."""
        return sum(test.verdict == verdict for test in self.tests)

    @property
    def verdict(self) -> str:
        """The session in one sentence."""
        judged, errors, warned = len(self.judged), self.with_verdict("error"), self.with_verdict("warning")
        if not judged:
            return "No test judged a LoRA set-up"
        of_all = f"of {counted_tests(judged)}"
        if errors:
            return f"{errors} {of_all} found errors"
        if warned:
            return f"No errors, and warnings in {warned} {of_all}"
        return (
            "The test that judged a LoRA set-up found it healthy"
            if judged == 1
            else f"All {judged} tests healthy"
        )

    def to_json(self) -> str:
        """The session as one JSON object, with the version of its ``format``."""
        data = asdict(self)
        # asdict knows neither how a report travels nor that JSON has no NaN.
        for plain, test in zip(data["tests"], self.tests, strict=True):
            plain["reports"] = [json.loads(report.to_json()) for report in test.reports]
        data["counts"], data["versions"], data["seeds"] = (
            dict(self.counts),
            dict(self.versions),
            dict(self.seeds),
        )
        return json_text({"format": FORMAT, **data}, indent=1, allow_nan=False)


def counted_tests(number: int) -> str:
    """``"1 test"``, ``"2 tests"``."""
    return f"{number} test{'' if number == 1 else 's'}"


def ran_on_gpu(uses: Mapping[str, GpuUse]) -> dict[str, GpuUse]:
    """The tests that ran on a GPU."""
    return {test: use for test, use in uses.items() if not use.skipped and use.devices}


def skipped_on_gpu(uses: Mapping[str, GpuUse]) -> dict[str, list[str]]:
    """The tests that did not run, by why."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for test, use in uses.items():
        if use.skipped:
            groups[use.skipped].append(test)
    return groups


def gpu_cells(test: str, use: GpuUse) -> tuple[str, ...]:
    """The columns of a test that ran, a dash where nothing is known."""
    return (
        test,
        ", ".join(use.devices),
        *(
            _UNKNOWN if size is None else format_bytes(size)
            for size in (use.peak_bytes, use.limit_bytes, use.predicted_bytes)
        ),
        _UNKNOWN if use.seconds is None else f"{use.seconds:.2f}",
    )


def gpu_troubles(uses: Mapping[str, GpuUse]) -> Iterator[str]:
    """Yield what no single test shows: memory left behind, and tests that could not run as CUDA was broken."""
    for test, use in uses.items():
        if use.left_bytes:
            where = ", ".join(use.devices)
            yield f"{test} left {format_bytes(use.left_bytes)} ({use.left_bytes} bytes) allocated on {where}"
    broken = Counter(use.broken_by for use in uses.values() if use.broken_by)
    for test, number in broken.items():
        were = "1 GPU test was" if number == 1 else f"{number} GPU tests were"
        yield f"{test} broke CUDA: {were} not run after it in that process"
