"""The checks during a training run: each finding once, as a warning, as a request to stop, or raised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_lora.arguments import require_expect, require_trainers
from pytest_lora.assertions import LoraHealthError, delivered, stack_level
from pytest_lora.checks.model import NO_BATCH, check_model
from pytest_lora.checks.training import judge_history
from pytest_lora.expect import Expect
from pytest_lora.facts.history import as_count, as_number, history_facts
from pytest_lora.findings import LoraHealthWarning, Report
from pytest_lora.rules import judge
from pytest_lora.rules.selection import codes, in_force, selected
from pytest_lora.runs.distributed import is_first_rank
from pytest_lora.runs.hooks import at_each_step
from pytest_lora.runs.trackers import PROJECT, TrackedFindings
from pytest_lora.values import require_one_of

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from pytest_lora.facts.training import Objective
    from pytest_lora.inspection.training import FirstSteps

OnError = Literal["warn", "stop", "raise"]

_LOOK_AGAIN = 1.25
"""Losses on record grow by this factor between two looks at the curve: every look may err, and so they are few."""

FIRST_STEPS = 2
"""The first step moves ``lora_B``, which gives ``lora_A`` its first gradient at the second."""

BETWEEN = ("pytest_lora", "contextlib", "transformers", "accelerate", "trl")
"""Packages between the user's line and a finding, which is the line that a warning names."""


class Watch:
    """What a run has shown so far.

    Attributes:
        reports: Every report that had something new, in order.
        zero_has_gradient: Whether a loss of zero was seen to leave a gradient, as that of a policy gradient does.
        should_stop: Whether an error was found; for loops that end themselves under ``on_error="stop"``.
    """

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        steps_per_loss: int = 1,
        expect: Expect | None = None,
        select: Iterable[str] = (),
        ignore: Iterable[str] = (),
        on_error: OnError = "warn",
        first_steps: int = FIRST_STEPS,
        listener: Callable[[Report, int], None] | None = None,
    ) -> None:
        require_one_of("on_error", on_error, get_args(OnError))
        self.total_steps = None if total_steps is None else as_count("total_steps", total_steps)
        self.steps_per_loss = as_count("steps_per_loss", steps_per_loss)
        self.learning_rate: float | None = None
        self.reports: list[Report] = []
        self.zero_has_gradient = self.should_stop = False
        self._left: dict[Literal["model", "rows"], tuple[tuple[str, str], ...]] = {}
        self._expect = require_expect(expect)
        self._trained_with = self._expect
        self._select, self._ignore = codes("select", select), codes("ignore", ignore)
        self._on_error = on_error
        self._train: list[float] = []
        self._rates: list[float] = []
        self._earlier = 0
        self._evals: dict[int, float] = {}
        self._known: set[tuple[str, str]] = set()
        self._next_look = 0.0
        self._first_steps: FirstSteps | None = None
        self._steps_to_note = first_steps
        self._listener = listener

    @property
    def not_judged(self) -> tuple[tuple[str, str], ...]:
        """What could not be judged, as pairs: why, and what; weights that FSDP divides among ranks, for one."""
        return (*self._left.get("model", ()), *self._left.get("rows", ()))

    @property
    def count(self) -> int:
        """Training losses on record."""
        return len(self._train)

    def recall(self, losses: Sequence[float], eval_losses: Mapping[int, float]) -> None:
        """Take the losses of a run that is resumed: those of training in order, of evaluations by optimizer step."""
        self._train[:0] = losses
        self._earlier = len(losses)
        self._evals.update(eval_losses)

    def log(self, loss: Any, *, eval_loss: Any = None, learning_rate: float | None = None) -> None:
        """Record the loss of a step, and with it that of an evaluation, and judge the curve if it is time.

        With the learning rate of every step, warm-up and restarts of the schedule are not taken for faults.
        """
        self._train.append(as_number("loss", loss))
        if learning_rate is not None:
            self._rates.append(as_number("learning_rate", learning_rate))
        if eval_loss is not None:
            self._note_evaluation("eval_loss", eval_loss)
        suspicious = self._train[-1] == 0 or self._train[-1] * 0 != 0
        if suspicious or len(self._train) >= self._next_look:
            self._next_look = len(self._train) * _LOOK_AGAIN
            self.judge()
        if not self._steps_to_note:
            self.judge_first_steps()

    def log_eval(self, loss: Any) -> None:
        """Record the loss of an evaluation after the latest step."""
        self._note_evaluation("loss", loss)

    def _note_evaluation(self, argument: str, loss: Any) -> None:
        self._evals[len(self._train) * self.steps_per_loss] = as_number(argument, loss)

    def look(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Judge the model and its optimizer as they stand."""
        report = check_model(model, optimizer=optimizer, expect=self._expect)
        # The batches come with the steps.
        self._left["model"] = tuple(left for left in report.not_judged if left[0] != NO_BATCH)
        report = replace(report, not_judged=self.not_judged)
        self._trained_with = _with_adapter(self._expect, model)
        if optimizer is not None:
            rates = [group.get("lr") for group in optimizer.param_groups]
            self.learning_rate = max((float(r) for r in rates if r), default=self.learning_rate)
        self.deliver(report)

    def note_rows(self, report: Report) -> None:
        """Tell what the first rows of the training data show."""
        self._left["rows"] = report.not_judged
        self.deliver(report)

    def before_step(
        self,
        model: nn.Module,
        optimizer: Any,
        schedule: Any = None,
        *,
        scaler: bool = False,
        objective: Objective = "",
    ) -> None:
        """Note the gradients of one of the first steps, right before the optimizer takes it."""
        from pytest_lora.inspection.fsdp_internals import is_divided
        from pytest_lora.inspection.training import FirstSteps

        if self._steps_to_note and not is_divided(model):
            if self._first_steps is None:
                self._first_steps = FirstSteps(
                    model, optimizer, schedule, scaler, objective, self.total_steps
                )
            self._first_steps.before_step()

    def after_step(self) -> None:
        """Note what that step moved; the first steps are judged with the next loss after the last of them."""
        if self._first_steps is not None and self._steps_to_note:
            self._first_steps.after_step()
            self._steps_to_note -= 1

    def judge_first_steps(self) -> None:
        """Judge the first steps as far as they were seen, once."""
        seen = self._first_steps
        self.forget_first_steps()
        own = self._train[self._earlier :]
        if seen is None or seen.overflowed or not own:
            return
        losses = [own[min(i // self.steps_per_loss, len(own) - 1)] for i in range(seen.count)]
        # Trainers log a loss that is NaN as 0; the rules on the losses tell of both.
        if all(loss * 0 == 0 and loss != 0 for loss in losses):
            facts = seen.facts(losses)
            subject = f"first {seen.count} steps of {facts.model.base.architecture}"
            self.deliver(Report(subject, tuple(judge([facts], self._expect))))

    def forget_first_steps(self) -> None:
        """Let go of the copies of what trains; no further step is noted."""
        self._first_steps, self._steps_to_note = None, 0

    def judge(self) -> None:
        """Judge the losses so far."""
        if self._train:
            facts = history_facts(
                self._train,
                self._evals or None,
                total_steps=self.total_steps,
                steps_per_loss=self.steps_per_loss,
                learning_rate=self._rates if len(self._rates) == len(self._train) else self.learning_rate,
                zero_has_gradient=self.zero_has_gradient,
            )
            self.deliver(judge_history(facts, self._trained_with))

    def deliver(self, report: Report) -> None:
        """Tell what is new in a report."""
        found = selected(report.findings, self._select, self._ignore)
        fresh = tuple(f for f in found if (f.code, f.severity) not in self._known)
        if not fresh and (self.reports or not report.not_judged):
            return
        self._known.update((f.code, f.severity) for f in fresh)
        new = report.with_findings(fresh)
        self.reports.append(new)
        delivered.append(new)
        if self._listener is not None and fresh and is_first_rank():
            self._listener(new, len(self._train) * self.steps_per_loss)
        self.should_stop |= bool(new.errors or (in_force().strict and new.warnings))
        for finding in (*new.errors, *new.warnings):
            if is_first_rank() and (finding.severity == "warning" or self._on_error != "raise"):
                warnings.warn(str(finding), LoraHealthWarning, stacklevel=stack_level(*BETWEEN))
        grave = new.errors or (new.warnings if in_force().strict else ())
        if grave and self._on_error == "raise":
            raise LoraHealthError(new)


def _with_adapter(expect: Expect, model: nn.Module) -> Expect:
    """What is meant, with the adapter that is trained, so that advice on its rank has numbers."""
    from pytest_lora.inspection.peft_internals import lora_configs
    from pytest_lora.inspection.survey import survey

    configs = lora_configs(survey(model).root) if expect.config is None else {}
    return replace(expect, config=next(iter(configs.values()))) if configs else expect


@contextmanager
def watch_training(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    total_steps: int | None = None,
    steps_per_loss: int = 1,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    on_error: OnError = "warn",
    trackers: Iterable[Any] = (),
    project: str = PROJECT,
    folder: str = ".",
) -> Iterator[Watch]:
    """Watch a hand-written training loop: the model at the start and the end, the losses as they come.

    What the optimizer's first two steps show, gradients among it, is judged with the first loss after them.

    Example:
        ```python
        with watch_training(model, optimizer, total_steps=len(batches)) as watch:
            for batch in batches:
                loss = model(**batch).loss
                ...
                watch.log(loss)
        ```

    Args:
        model: The model with its adapters; looked at, never run.
        optimizer: What trains it; it carries hooks on its steps meanwhile. Without, no gradient is seen.
        total_steps: Optimizer steps that the run is planned to have.
        steps_per_loss: Optimizer steps from one logged loss to the next.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.
        on_error: ``"warn"``: errors are ``LoraHealthWarning`` too. ``"stop"``: and ``watch.should_stop`` is what
            the loop looks at (it is kept in every mode). ``"raise"``: ``LoraHealthError`` at the next ``log``.
        trackers: Experiment trackers that get each finding as it comes: names that accelerate knows (``"wandb"``,
            ``"mlflow"``, ``"trackio"``, ``"tensorboard"``, ...), or trackers of accelerate that are open.
        project: Project, or experiment, of the trackers that are named.
        folder: Where trackers that write files write them.

    Raises:
        LoraHealthError: Under ``"raise"``, at the first report with an error.
        TypeError: The model carries no LoRA layers, or an argument has the wrong type.
        ValueError: ``on_error`` is none of these, a number of steps is below 1, or there is no such tracker.
    """
    tracked = TrackedFindings(trackers, project, folder)
    watch = Watch(
        total_steps=total_steps,
        steps_per_loss=steps_per_loss,
        expect=expect,
        select=select,
        ignore=ignore,
        on_error=on_error,
        listener=tracked,
    )
    require_trainers(optimizer, None, None)
    try:
        watch.look(model, optimizer)
        with at_each_step(watch, model, optimizer):
            yield watch
        watch.judge()
        watch.judge_first_steps()
        watch.look(model, optimizer)
    finally:
        watch.forget_first_steps()
        tracked.close()
