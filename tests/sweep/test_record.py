"""What is made of a sweep: pictures, and entries in experiment trackers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pytest_lora import SweepResult
from pytest_lora.sweep.rows import Failure, TrialRow

SETTINGS = {"fraction": "0.1", "epochs": "1", "config": "x" * 900}


def result(maximise: bool = True, seeds: int = 3, known: bool = True) -> SweepResult:
    values = {4: 0.92, 8: 0.94, 16: 0.941}
    trials = [
        TrialRow(
            rank,
            2 * rank,
            seed,
            metric=(value if maximise else 1 - value) + seed / 1000,
            losses=(2.0, 1.0),
            seconds=100.0 + rank if known else None,
            flops=10**12 + rank * 10**10 if known else None,
            peak_bytes=2**30 + rank if known else None,
            memory="measured" if known else "not estimated: no reason",
            trainable=1000 * rank,
            data="40 of 400",
        )
        for rank, value in values.items()
        for seed in range(seeds)
    ]
    failed = TrialRow(32, 64, 0, failure=Failure("out of memory", "much", "take less"))
    return SweepResult(
        "accuracy" if maximise else "loss",
        maximise,
        0.5,
        (*trials, failed),
        SETTINGS,
        {"torch": "2.13", "peft": "0.21"},
    )


def test_table_as_text_and_markdown() -> None:
    assert result().table() == (
        "accuracy by rank (more is better, 0.5 before training; 3 seeds)\n"
        "rank  accuracy     +-  of the best  seconds  GFLOP  peak memory (measured)  trainable\n"
        "   4     0.921  0.001       95.2 %      104  1,040                 1.0 GiB      4,000\n"
        "   8     0.941  0.001       99.8 %      108  1,080                 1.0 GiB      8,000\n"
        "  16     0.942  0.001        100 %      116  1,160                 1.0 GiB     16,000\n"
        "  32         -      -            -        -      -                       -          -\n"
        "r=32, seed 0: out of memory: much; take less"
    )
    markdown = result(seeds=1, known=False).table("markdown")
    assert markdown.splitlines()[:4] == [
        "accuracy by rank (more is better, 0.5 before training; 1 seed):",
        "",
        "| rank | accuracy | +- | of the best | seconds | GFLOP | peak memory | trainable |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    assert markdown.endswith("- peak memory not estimated: no reason")
    with pytest.raises(ValueError, match=r"^style must be one of text, markdown, not 'html'$"):
        result().table("html")


# ------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


def pixels(path: Path) -> set[str]:
    """The colours of a picture that cover more than a hundredth of a percent, as text."""
    image = pytest.importorskip("PIL.Image").open(path).convert("RGB")
    width, height = image.size
    colours = image.getcolors(width * height)
    return {f"#{r:02x}{g:02x}{b:02x}" for count, (r, g, b) in colours if count > width * height / 10_000}


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize(
    ("theme", "background", "chosen"), [("light", "#ffffff", "#c2410c"), ("dark", "#14171c", "#ff9d5c")]
)
def test_pictures_in_light_and_dark(theme: str, background: str, chosen: str, tmp_path: Path) -> None:
    path = result().plot(tmp_path / "ranks.png", theme=theme)
    found = pixels(path)
    assert {background, chosen} <= found


@pytest.mark.usefixtures("_matplotlib")
def test_a_vector_picture_says_what_is_chosen_and_marks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    text = result().plot(tmp_path / "ranks.svg").read_text()
    said = "".join(ElementTree.fromstring(text).itertext())
    for words in (
        "Rank 8: it reaches 99.8 % of the best",
        "r=8: 0.941",
        "95 % of the best",
        "before training",
        "accuracy (more is better)",
        "training time, s",
        "operations, TFLOP",
        "peak memory, GiB (measured)",
    ):
        assert words in said
    assert "32" not in re.findall(r">(\d+)<", text)  # no trial of it has a metric


def rated(dropped: bool = False) -> SweepResult:
    """Two rates a rank; with ``dropped`` the lower one after a part of the training."""
    whole = result()
    low = [
        dataclasses.replace(
            row, learning_rate=1e-4, metric=row.metric - 0.02, budget=0.25 if dropped else 1.0
        )
        for row in whole.trials
        if row.metric is not None
    ]
    high = [dataclasses.replace(row, learning_rate=3e-4) for row in whole.trials if row.metric is not None]
    return dataclasses.replace(whole, trials=(*low, *high))


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize("dropped", [False, True])
def test_a_picture_of_rates_names_every_line_and_what_is_open(
    dropped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    text = rated(dropped).plot(tmp_path / "ranks.svg").read_text()
    said = [element.text for element in ElementTree.fromstring(text).iter() if element.text]
    assert {"1e-4", "3e-4", "accuracy by learning rate", "accuracy against its price"} <= set(said)
    assert [said.count(f"r={rank}") for rank in (4, 8, 16)] == [2, 2, 2]  # in both new panels
    assert ("open: after a part of the training" in said) is dropped
    assert any("Rank 8 at 3e-4: it reaches 99.8 % of the best" in one for one in said)
    assert "operations, TFLOP: the dearest takes 11.5 % more than the cheapest" in said
    lines = set(re.findall(r"stroke-dasharray: ([\d. ,]+)", text))
    assert len(lines) >= (1 if dropped else 3)


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize(
    ("flops", "title"),
    [(4 * 10**9, "operations, GFLOP"), (3 * 10**15, "operations, PFLOP"), (None, "not known")],
)
def test_operations_have_the_unit_that_fits(flops: int | None, title: str, tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        trial = dataclasses.replace(result().trials[0], flops=flops)
        text = dataclasses.replace(result(), trials=(trial,)).plot(tmp_path / "ranks.svg").read_text()
    assert title in text


@pytest.mark.usefixtures("_matplotlib")
def test_the_same_sweep_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.hashsalt", "x")
    one = result(maximise=False, seeds=1, known=False).plot(tmp_path / "1.svg").read_bytes()
    assert result(maximise=False, seeds=1, known=False).plot(tmp_path / "2.svg").read_bytes() == one


@pytest.mark.usefixtures("_matplotlib")
def test_pictures_leave_no_figure_open_and_no_setting_changed(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    before, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    result().plot(tmp_path / "ranks.png", theme="dark")
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == figures


@pytest.mark.usefixtures("_matplotlib")
def test_what_a_picture_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^theme must be one of light, dark, not 'blue'$"):
        result().plot(tmp_path / "x.png", theme="blue")
    with pytest.raises(ValueError, match=r"^path must end in one of .*, not 'x.doc'$"):
        result().plot(tmp_path / "x.doc")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^plot needs matplotlib: pip install 'pytest-lora\[plot\]'$"):
        result().plot(tmp_path / "x.png")


# ------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_gets_provenance_and_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.state import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(PartialState, "_shared_state", {})  # other tests may have trained with a Trainer
    result().log("tensorboard", project="which-rank", folder=str(tmp_path))
    assert not PartialState._shared_state  # so that the user's own Accelerator can be set up as it likes
    events = EventAccumulator(str(tmp_path / "which-rank")).Reload()
    metric = events.Scalars("rank_sweep/accuracy")
    assert [(event.step, round(event.value, 4)) for event in metric] == [(4, 0.921), (8, 0.941), (16, 0.942)]
    assert [event.step for event in events.Scalars("rank_sweep/flops")] == [4, 8, 16]
    (written,) = (tmp_path / "which-rank").rglob("hparams.yml")
    text = written.read_text()
    for line in (
        "rank: 8",
        "alpha: 16",
        "sweep_ranks: 4, 8, 16, 32",
        "sweep_seeds: 0, 1, 2",
        "sweep_slice: 40 of 400",
        "sweep_fraction: '0.1'",
        "sweep_failed_trials: 1",
        "version_torch: '2.13'",
        "metric_before: 0.5",
    ):
        assert line in text
    assert "x" * 500 in text
    assert "x" * 501 not in text


def test_a_tracker_that_is_open_stays_open() -> None:
    from accelerate.tracking import GeneralTracker

    class Notes(GeneralTracker):
        name, requires_logging_directory, main_process_only = "notes", False, False

        def __init__(self) -> None:
            super().__init__()
            self.config: dict[str, object] = {}
            self.logged: list[tuple[int | None, dict[str, float]]] = []
            self.finished = False

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, object]) -> None:
            self.config |= values

        def log(self, values: dict[str, float], step: int | None = None) -> None:
            self.logged.append((step, values))

        def finish(self) -> None:
            self.finished = True

    notes = Notes()
    result().log(notes)
    assert not notes.finished
    assert notes.config["rank"] == 8
    assert "doubling  holds" in str(notes.config["rank_rule_doubling"])
    assert [step for step, _ in notes.logged] == [4, 8, 16, 32]
    assert notes.logged[-1] == (32, {})
    assert json.dumps(notes.config)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    result().log("wandb", project="which-rank")
    assert list(tmp_path.rglob("*.wandb"))


def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    monkeypatch.chdir(tmp_path)
    result().log("mlflow", project="which-rank", folder=str(tmp_path))
    (run,) = mlflow.search_runs(experiment_names=["which-rank"], output_format="list")
    assert run.data.params["rank"] == "8"
    assert run.data.metrics["rank_sweep/accuracy"] == pytest.approx(0.942)


def test_trackio_in_a_folder(tmp_path: Path) -> None:
    """In a process of its own: Trackio takes its folder when it is imported."""
    pytest.importorskip("trackio")
    code = "from tests.sweep.test_record import result; result().log('trackio', project='which-rank')"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRACKIO_DIR": str(tmp_path)}, check=True)
    assert list(tmp_path.rglob("*which-rank*"))


def test_a_tracker_that_starts_on_every_process_finds_the_state_of_accelerate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of Weights & Biases and Trackio do: only trackers of the main process ask for that state themselves."""
    from accelerate import tracking
    from accelerate.state import PartialState

    started: list[str] = []

    class EveryProcess(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "wandb", False, False
        tracker = None

        def __init__(self, project: str) -> None:
            super().__init__()
            self.project = project

        def start(self) -> None:
            tracking.logger.debug("accelerate's logger raises where there is no state")
            started.append(self.project)

        def store_init_configuration(self, values: dict[str, object]) -> None: ...

        def log(self, values: dict[str, float], step: int | None = None) -> None: ...

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", EveryProcess)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    result().log("wandb", project="which-rank")
    assert started == ["which-rank"]
    assert not PartialState._shared_state


def test_what_trackers_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^trackers must name at least one, such as 'tensorboard'$"):
        result().log()
    with pytest.raises(
        ValueError, match=r"^trackers: there is no tracker 'tensorbored'; accelerate has aim, "
    ):
        result().log("tensorbored", folder=str(tmp_path))
    with pytest.raises(TypeError, match=r"^trackers must be names or trackers of accelerate, not int 3$"):
        result().log(3)
    with pytest.raises(ValueError, match=r"^the package of the tracker 'clearml' is not installed$"):
        result().log("clearml")
    assert list(tmp_path.iterdir()) == []
