"""The checks as a callback of Lightning's Trainer; importing this needs the package ``lightning``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pytest_lora.assertions import stack_level
from pytest_lora.findings import LoraHealthWarning
from pytest_lora.inspection.model import carries_lora
from pytest_lora.rules.selection import codes
from pytest_lora.runs.hooks import at_each_step
from pytest_lora.runs.trackers import PROJECT, TrackedFindings
from pytest_lora.runs.watch import BETWEEN, OnError, Watch

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError("LoraHealthLightning needs Lightning: pip install lightning") from error

if TYPE_CHECKING:
    from pytest_lora.expect import Expect

LEAST_LOSSES = 20
"""A run that logs fewer losses than this by itself is listened to more often, so that its curve can be judged."""


class LoraHealthLightning(Callback):
    """Judge a run of Lightning: the model before it starts, its first steps, the losses, the model at its end.

    The same watch as ``LoraHealthCallback`` for the transformers Trainer. The loss is that of ``training_step``, its
    mean over ``log_every_n_steps`` optimizer steps, or over fewer in a short run; nothing is fetched from a GPU in
    between. Gradients are looked at in one process, and with one optimizer.

    A module without LoRA layers is said to have none, once, and nothing of its run is judged.

    Args:
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.
        on_error: ``"warn"``, ``"stop"`` (the run ends after the batch) or ``"raise"`` (``LoraHealthError`` out of
            ``trainer.fit()``).
        eval_loss: Under what name ``validation_step`` logs the loss on held-out data.
        trackers: Experiment trackers that get each finding as it comes; see ``LoraHealthCallback``.
        project: Project, or experiment, of the trackers that are named.
        folder: Where trackers that write files write them.

    Raises:
        TypeError: ``expect`` is no ``Expect``, or a tracker is none.
        ValueError: ``on_error`` is none of the three, or there is no such tracker.
    """

    def __init__(
        self,
        *,
        expect: Expect | None = None,
        select: Iterable[str] = (),
        ignore: Iterable[str] = (),
        on_error: OnError = "warn",
        eval_loss: str = "val_loss",
        trackers: Iterable[Any] = (),
        project: str = PROJECT,
        folder: str = ".",
    ) -> None:
        super().__init__()
        self._tracked = TrackedFindings(trackers, project, folder)
        self._settings: dict[str, Any] = {
            "expect": expect,
            "select": codes("select", select),
            "ignore": codes("ignore", ignore),
            "on_error": on_error,
            "listener": self._tracked,
        }
        self._eval_loss = eval_loss
        self.watch = Watch(**self._settings)
        self._hooks = ExitStack()
        self._judges = False
        self._sum: Any = None
        self._losses = 0
        self._logged_at = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start a new watch, and judge the model and the optimizer."""
        self._judges = carries_lora(pl_module)
        if not self._judges:
            warnings.warn(
                f"LoraHealthLightning: this {type(pl_module).__name__} carries no LoRA layers, so that nothing is "
                "judged; make them with peft.get_peft_model(base, LoraConfig(...))",
                LoraHealthWarning,
                stacklevel=stack_level(*BETWEEN, "lightning", "pytorch_lightning"),
            )
            return
        planned = trainer.estimated_stepping_batches
        total = int(planned) if math.isfinite(planned) and planned > 0 else None
        every = max(1, trainer.log_every_n_steps)
        if total is not None:
            every = max(1, min(every, total // LEAST_LOSSES))
        self.watch = Watch(total_steps=total, steps_per_loss=every, **self._settings)
        self._sum, self._losses, self._logged_at = None, 0, trainer.global_step
        self._look(trainer, pl_module)
        if trainer.world_size == 1 and len(trainer.optimizers) == 1:
            scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
            self._hooks.enter_context(
                at_each_step(self.watch, pl_module, trainer.optimizers[0], scaler=scaler)
            )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss of a batch, and judge the curve when it is time."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not self._judges or loss is None:
            return
        self._sum = loss if self._sum is None else self._sum + loss
        self._losses += 1
        if trainer.global_step - self._logged_at >= self.watch.steps_per_loss:
            self._log(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the loss on held-out data."""
        loss = trainer.callback_metrics.get(self._eval_loss)
        if self._judges and loss is not None and not trainer.sanity_checking and self.watch.count:
            self.watch.log_eval(loss)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Judge the whole history and the model at its end."""
        if not self._judges:
            return
        try:
            if self._losses and not self.watch.count:
                self._log(trainer)
            self.watch.judge()
            self.watch.judge_first_steps()
            self._look(trainer, pl_module)
        finally:
            self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook on the optimizer."""
        self._let_go()

    def _log(self, trainer: Any) -> None:
        mean, self._sum, self._losses = self._sum / self._losses, None, 0
        self._logged_at = trainer.global_step
        self.watch.log(mean)
        self._stop_if_asked(trainer)

    def _look(self, trainer: Any, pl_module: Any) -> None:
        optimizers = trainer.optimizers
        self.watch.look(pl_module, optimizers[0] if len(optimizers) == 1 else None)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Any) -> None:
        if self._settings["on_error"] == "stop" and self.watch.should_stop:
            trainer.should_stop = True

    def _let_go(self) -> None:
        self._hooks.close()
        self.watch.forget_first_steps()
        self._tracked.close()
