"""Findings of a run in experiment trackers, and in a run of Axolotl."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from transformers import Trainer, TrainingArguments

from pytest_lora import LoraHealthCallback, LoraHealthWarning, watch_training
from pytest_lora.findings import Finding, Report
from pytest_lora.runs.trackers import TEXTS_BY_STEP, TrackedFindings
from tests.runs.test_lightning import adam, adapted
from tests.runs.test_watch import ROWS

FOUND = Finding("LORA341", "loss_does_not_move", "error", "here", "seen", "wanted", "mend")


class Notes(GeneralTracker):
    """A tracker that keeps what it gets."""

    name, requires_logging_directory, main_process_only = "notes", False, False

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.finished, self.broken = False, broken

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config |= values

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.broken:
            raise OSError("no network")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def frozen() -> Any:
    """An adapter of which only one factor trains."""
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    return model


def test_the_callback_tells_a_tracker_that_is_open_as_findings_come(tmp_path: Path) -> None:
    notes = Notes()
    args = TrainingArguments(str(tmp_path), max_steps=3, logging_steps=1, report_to="none", use_cpu=True)
    trainer = Trainer(frozen(), args, train_dataset=ROWS, callbacks=[LoraHealthCallback(trackers=[notes])])
    with pytest.warns(LoraHealthWarning):
        trainer.train()
    assert notes.logged[0][0] == 0
    assert notes.logged[0][1]["lora/LORA224"] == 1.0
    later = next(values for step, values in notes.logged if step and "lora/LORA313" in values)
    assert later["lora/errors"] > notes.logged[0][1]["lora/errors"]
    assert "lora_LORA224" in notes.config
    assert not notes.finished


def test_tensorboard_is_opened_with_the_first_finding_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.state import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(PartialState, "_shared_state", {})
    healthy = adapted()
    with watch_training(healthy, adam(healthy), trackers="tensorboard", folder=str(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []
    model = frozen()
    with (
        pytest.warns(LoraHealthWarning),
        watch_training(model, adam(model), trackers=["tensorboard"], project="runs", folder=str(tmp_path)),
    ):
        pass
    assert not PartialState._shared_state
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("lora/LORA224")] == [(0, 1.0)]
    assert "lora/LORA224/text/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize("name", TEXTS_BY_STEP)
def test_what_was_found_is_written_by_step_where_settings_come_too_late(name: str) -> None:
    notes = Notes()
    notes.name = name
    TrackedFindings([notes])(Report("run", (FOUND,)), 4)
    assert notes.logged[-1] == (4, {"lora/LORA341/text": str(FOUND)})
    assert not notes.config


def test_a_tracker_that_fails_ends_no_training() -> None:
    broken, sound = Notes(broken=True), Notes()
    tracked = TrackedFindings([broken, sound])
    with pytest.warns(LoraHealthWarning, match="the tracker 'notes' takes no findings: no network"):
        tracked(Report("run", (FOUND,)), 4)
    tracked(Report("run", (FOUND,)), 5)
    assert [step for step, _ in sound.logged] == [4, 5]
    assert sound.logged[-1][1]["lora/errors"] == 2.0


def test_a_tracker_that_nobody_knows_is_refused() -> None:
    for make in (lambda t: LoraHealthCallback(trackers=t), TrackedFindings):
        with pytest.raises(ValueError, match="there is no tracker 'wandbb'"):
            make("wandbb")
        with pytest.raises(TypeError, match="not int 3"):
            make([3])


# ------------------------------------------------------------------------------------------------- Axolotl


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin, made as Axolotl makes it from the name in its YAML: by shape, as Axolotl is not installed here."""
    pytest.importorskip("pydantic")
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type(
        "BasePlugin",
        (),
        {
            "__init__": lambda self: None,
            "get_input_args": lambda self: None,
            "pre_model_load": lambda self, cfg: None,
            "add_callbacks_pre_trainer": lambda self, cfg, model: [],
            "add_callbacks_post_trainer": lambda self, cfg, trainer: [],
        },
    )
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "pytest_lora.runs.axolotl", raising=False)
    home, _, name = "pytest_lora.runs.axolotl.LoraHealthPlugin".rpartition(".")
    module = __import__(home, fromlist=[name])
    yield getattr(module, name)()
    sys.modules.pop(home, None)


def test_the_plugin_of_axolotl_gives_the_callback_that_its_yaml_asks_for(plugin: Any, tmp_path: Path) -> None:
    home, _, name = plugin.get_input_args().rpartition(".")
    fields = getattr(sys.modules[home], name)
    cfg = fields(lora_health={"on_error": "stop", "ignore": ["LORA109"], "expect": {"alpha_ratio": 2.0}})
    (callback,) = plugin.add_callbacks_pre_trainer(cfg.model_dump(), None)
    assert isinstance(callback, LoraHealthCallback)
    assert callback._settings["on_error"] == "stop"
    assert callback._settings["expect"].alpha_ratio == 2.0
    args = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True)
    trainer = Trainer(frozen(), args, train_dataset=ROWS, callbacks=[callback])
    with pytest.warns(LoraHealthWarning) as told:
        trainer.train()
    assert any("LORA224" in str(one.message) for one in told)
    assert trainer.state.global_step < 2
    (plain,) = plugin.add_callbacks_pre_trainer(fields().model_dump(), None)
    assert plain._settings["on_error"] == "warn"
    with pytest.raises(TypeError, match="on_eror"):
        plugin.add_callbacks_pre_trainer({"lora_health": {"on_eror": "stop"}}, None)


def test_without_axolotl_the_plugin_says_so() -> None:
    with pytest.raises(ImportError, match="is for Axolotl, which is not installed here"):
        __import__("pytest_lora.runs.axolotl")
