"""The checks as a callback of the transformers Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from pytest_lora.watch import OnError, Watch

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from pytest_lora.expect import Expect


class LoraHealthCallback(TrainerCallback):
    """Judge a real run: the model before it starts and after its first steps, the losses as they are logged.

    Each finding is told once, as a ``LoraHealthWarning``. Errors do what ``on_error`` says: ``"warn"``,
    ``"stop"`` (the run ends after the step) or ``"raise"`` (``LoraHealthError`` out of ``trainer.train()``).

    Args:
        expect: What is meant, where only the user can know it.
        on_error: See above.
        model_steps: Optimizer steps after which the model is looked at again.

    Raises:
        ValueError: ``on_error`` is none of the three, or ``model_steps`` is below 1.
    """

    def __init__(
        self, *, expect: Expect | None = None, on_error: OnError = "warn", model_steps: int = 2
    ) -> None:
        if model_steps < 1:
            raise ValueError(f"model_steps must be at least 1, not {model_steps!r}")
        self._expect, self._on_error, self._model_steps = expect, on_error, model_steps
        self.watch = Watch(expect=expect, on_error=on_error)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a new watch and judge the model and the optimizer."""
        self.watch = Watch(
            total_steps=state.max_steps if state.max_steps > 0 else None,
            expect=self._expect,
            on_error=self._on_error,
        )
        self._look(control, kwargs)
        # The schedule has set the rate of the first step by now, which a warm-up makes small.
        self.watch.learning_rate = float(args.learning_rate)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the model again after the first steps."""
        if state.global_step == self._model_steps:
            self._look(control, kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the loss that the Trainer logs."""
        if logs and "loss" in logs:
            # Not args.logging_steps: losses may be logged by epoch, or by a share of the run.
            self.watch.steps_per_loss = max(1, round(state.global_step / (self.watch.count + 1)))
        for name, take in (("loss", self.watch.log), ("eval_loss", self.watch.log_eval)):
            if logs and name in logs:
                take(logs[name])
        self._stop_if_asked(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the whole history and the model at its end."""
        self.watch.judge()
        self._look(control, kwargs)

    def _look(self, control: TrainerControl, kwargs: dict[str, Any]) -> None:
        rate = self.watch.learning_rate
        self.watch.look(kwargs["model"], kwargs.get("optimizer"))
        self.watch.learning_rate = rate
        self._stop_if_asked(control)

    def _stop_if_asked(self, control: TrainerControl) -> None:
        if self._on_error == "stop" and self.watch.should_stop:
            control.should_training_stop = True
