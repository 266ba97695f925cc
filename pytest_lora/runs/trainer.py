"""The checks as a callback of the transformers Trainer; it judges the first rows of the data before the first step."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from pytest_lora.assertions import stack_level
from pytest_lora.expect import Expect
from pytest_lora.facts.history import as_count
from pytest_lora.findings import LoraHealthWarning, Report
from pytest_lora.inspection.model import carries_lora
from pytest_lora.rules import judge
from pytest_lora.rules.selection import codes
from pytest_lora.runs.hooks import CalledThrough
from pytest_lora.runs.trackers import PROJECT, TrackedFindings
from pytest_lora.runs.watch import BETWEEN, FIRST_STEPS, OnError, Watch

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from pytest_lora.facts.training import Objective


class LoraHealthCallback(TrainerCallback):
    """Judge a real run: the model before it starts and after its first steps, the losses as they are logged.

    Gradients, learning rates and moves of the first steps are judged with the first loss that the Trainer logs after
    them (``logging_steps``), but under DeepSpeed or FSDP on several ranks: there no process sees whole gradients, and
    ``watch.not_judged`` says so. Before the first step, the first rows of the training data are judged as the loader's
    collator makes them: eight, or a batch where that is more. They are read by index, beside the loader and the user's
    iterator; a stream is not read, and ``watch.not_judged`` says so.

    The run itself goes as it would without: no forward pass is added, no random number drawn, and no rank waits for
    another. Every rank judges; the first one tells. Under DDP the Trainer shows its callbacks the model inside of it;
    the wrapper is judged when it first calls that, and at the later times.

    A model without LoRA layers is said to have none, once, and nothing of its run is judged.

    Each finding is reported once, as a ``LoraHealthWarning``. Errors do what ``on_error`` says: ``"warn"``,
    ``"stop"`` (the run ends after the step) or ``"raise"`` (``LoraHealthError`` out of ``trainer.train()``).

    Args:
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.
        on_error: See above.
        model_steps: Optimizer steps whose gradients are looked at, and after which the model is again. The default
            is 2: the first step moves ``lora_B``, which gives ``lora_A`` its first gradient at the second.
        trackers: Experiment trackers that get each finding as it comes, beside those of ``report_to``: names that
            accelerate knows (``"wandb"``, ``"mlflow"``, ``"trackio"``, ``"tensorboard"``, ...), or its trackers.
        project: Project, or experiment, of the trackers that are named.
        folder: Where trackers that write files write them.

    Raises:
        TypeError: ``expect`` is no ``Expect``, or ``model_steps`` no whole number.
        ValueError: ``on_error`` is none of the three, ``model_steps`` is below 1, or there is no such tracker.
    """

    def __init__(
        self,
        *,
        expect: Expect | None = None,
        select: Iterable[str] = (),
        ignore: Iterable[str] = (),
        on_error: OnError = "warn",
        model_steps: int = FIRST_STEPS,
        trackers: Iterable[Any] = (),
        project: str = PROJECT,
        folder: str = ".",
    ) -> None:
        self._tracked = TrackedFindings(trackers, project, folder)
        self._settings: dict[str, Any] = {
            "listener": self._tracked,
            "expect": expect,
            "select": codes("select", select),
            "ignore": codes("ignore", ignore),
            "on_error": on_error,
        }
        self._model_steps = as_count("model_steps", model_steps)
        self.watch = Watch(**self._settings)
        self._begun_at = self._unlogged = 0
        self._latest: tuple[str, int, object] | None = None
        self._judges = True
        self._called: CalledThrough | None = None
        self._wrapper: nn.Module | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a new watch and judge the model and the optimizer."""
        self._judges = carries_lora(kwargs["model"])
        if not self._judges:
            given = type(kwargs["model"]).__name__
            warnings.warn(
                f"LoraHealthCallback: this {given} carries no LoRA layers, so that nothing is judged; "
                "make them with peft.get_peft_model(base, LoraConfig(...))",
                LoraHealthWarning,
                stacklevel=stack_level(*BETWEEN),
            )
            return
        self.watch = Watch(
            total_steps=state.max_steps if state.max_steps > 0 else None,
            **self._settings,
            first_steps=self._model_steps,
        )
        self._latest = None
        self._begun_at = state.global_step
        losses, evals = _logged(state)
        self._unlogged = 0 if losses else state.global_step
        self.watch.recall(losses, evals)
        self._look(control, kwargs)
        self._look_at_rows(args, control, kwargs)
        self._wrapper = None
        self._called = CalledThrough(kwargs["model"], partial(self._judge_wrapper, control, kwargs))
        # The schedule has set the rate of the first step by now, which a warm-up makes small.
        self.watch.learning_rate = float(args.learning_rate)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the gradients of the first steps, as they are after clipping."""
        if self._is_idle("gradients", state):
            return
        optimizer = kwargs.get("optimizer")
        # DeepSpeed keeps gradients to itself.
        if optimizer is not None and "DeepSpeed" not in type(optimizer).__name__:
            self.watch.before_step(
                kwargs["model"],
                optimizer,
                kwargs.get("lr_scheduler"),
                scaler=bool(args.fp16),
                objective=_objective(args),
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what the first steps moved."""
        if not self._is_idle("step", state):
            self.watch.after_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the model again after the first steps."""
        if self._judges and state.global_step == self._begun_at + self._model_steps:
            self._look(control, kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the loss that the Trainer logs, or at its end the mean if it logged none."""
        if self._is_idle("losses", state, logs):
            return
        if logs and not self.watch.count and "train_loss" in logs:
            logs = {"loss": logs["train_loss"]}
        if logs and logs.get("loss") == 0 and 0 < float(logs.get("grad_norm") or 0) < math.inf:
            # The loss of a policy gradient is zero on average, and that of a step may be rounded to zero.
            self.watch.zero_has_gradient = True
        if logs and "loss" in logs:
            # Not args.logging_steps: losses may be logged by epoch, or by a share of the run.
            logged = state.global_step - self._unlogged
            self.watch.steps_per_loss = max(1, round(logged / (self.watch.count + 1)))
            self.watch.log(logs["loss"], learning_rate=logs.get("learning_rate"))
        if logs and "eval_loss" in logs:
            self.watch.log_eval(logs["eval_loss"])
        self._stop_if_asked(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the whole history and the model at its end."""
        if not self._judges:
            return
        self.watch.judge()
        self.watch.judge_first_steps()
        try:
            self._look(control, kwargs)
        finally:
            if self._called is not None:
                self._called.forget()
            self._called = self._wrapper = None
            self._tracked.close()

    def _is_idle(self, what: str, state: TrainerState, logs: object = None) -> bool:
        """Whether there is nothing to note: no LoRA, or the same thing again, as a callback is told that was added
        twice."""
        if not self._judges:
            return True
        before, self._latest = self._latest, (what, state.global_step, logs)
        return before is not None and before[:2] == self._latest[:2] and before[2] is logs

    def _judge_wrapper(self, control: TrainerControl, kwargs: dict[str, Any], wrapper: nn.Module) -> None:
        """Before the first backward, which torch may refuse."""
        self._wrapper = wrapper
        self._look(control, kwargs)

    def _look(self, control: TrainerControl, kwargs: dict[str, Any]) -> None:
        rate = self.watch.learning_rate
        model = kwargs["model"] if self._wrapper is None else self._wrapper
        self.watch.look(model, kwargs.get("optimizer"))
        self.watch.learning_rate = rate
        self._stop_if_asked(control)

    def _look_at_rows(self, args: TrainingArguments, control: TrainerControl, kwargs: dict[str, Any]) -> None:
        objective, loader = _objective(args), kwargs.get("train_dataloader")
        if objective == "policy" or loader is None:
            return  # its rows are prompts; what is trained on is written during the run
        rows, expect = int(args.train_batch_size), self._settings["expect"] or Expect()
        own = has_own_loss(self)
        self.watch.note_rows(
            report_on_rows(kwargs["model"], loader, rows, objective, expect, custom_loss=own)
        )
        self._stop_if_asked(control)

    def _stop_if_asked(self, control: TrainerControl) -> None:
        if self._settings["on_error"] == "stop" and self.watch.should_stop:
            control.should_training_stop = True


_PREFERENCES = ("DPOConfig", "KTOConfig", "ORPOConfig", "CPOConfig", "BCOConfig")
_POLICY = ("GRPOConfig", "RLOOConfig", "PPOConfig", "OnlineDPOConfig", "XPOConfig", "NashMDConfig")


def _objective(args: Any) -> Objective:
    """What a trainer trains for: the arguments of TRL's trainers have classes of their own."""
    names = {cls.__name__ for cls in type(args).__mro__}
    if names.intersection(_POLICY):
        return "policy"
    if names.isdisjoint(_PREFERENCES):
        return "texts" if "SFTConfig" in names else ""
    published = getattr(args, "loss_type", None) in ("sigmoid", ["sigmoid"])
    mixed = getattr(args, "rpo_alpha", None) is not None or bool(getattr(args, "label_smoothing", None))
    return "DPO" if "DPOConfig" in names and published and not mixed else "preferences"


def _logged(state: TrainerState) -> tuple[list[float], dict[int, float]]:
    """Losses of a run before it was resumed: those of training, and those of evaluations by step."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evals = {int(entry["step"]): entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    return losses, evals


_RULES_ON_ROWS = "labels, padding and other rules on batches"


def report_on_rows(
    model: nn.Module, loader: Any, rows: int, objective: Objective, expect: Expect, *, custom_loss: bool
) -> Report:
    """Judge the first rows of a loader; why they cannot be read stands in the report."""
    from pytest_lora.inspection.training import first_rows, row_facts

    batches, why = first_rows(loader, rows)
    if not batches:
        return Report("first rows", (), not_judged=((why, _RULES_ON_ROWS),) if why else ())
    facts = row_facts(model, batches, objective, custom_loss=custom_loss)
    return Report(f"first rows of {facts.model.base.architecture}", tuple(judge([facts], expect)))


def has_own_loss(callback: object) -> bool:
    """Whether the Trainer that calls a callback makes its loss otherwise than transformers and TRL do.

    A Trainer hands itself to no callback; it is looked for among the frames that called this one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        trainer: Any = frame.f_locals.get("self")
        handler = getattr(trainer, "callback_handler", None)
        if handler is not None and callback in getattr(handler, "callbacks", ()):
            home = type(trainer).compute_loss.__module__.partition(".")[0]
            return getattr(trainer, "compute_loss_func", None) is not None or home not in (
                "transformers",
                "trl",
            )
        frame = frame.f_back
    return True
