"""The keeper leaves every entry of its list as it was, whoever changes it and however the check ends."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pytest_lora import check_training
from pytest_lora.inspection.state import KEPT, Keeper
from pytest_lora.inspection.state.process import SETTINGS, Process
from tests.state.observed import Setup, amid_training, changed, do_nothing, observed

pytestmark = pytest.mark.filterwarnings("ignore")


def _weights(setup: Setup) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(setup.model.parameters()):
            if parameter.is_floating_point():
                parameter.add_(1.0)
            if parameter.ndim == 2 and index % 2:
                parameter.t_()
        parameter.data = parameter.data.clone()


def _gradients(setup: Setup) -> None:
    for gradient in setup.gradients:
        gradient.add_(1)
    for parameter in setup.model.parameters():
        parameter.grad = None


def _quantization(setup: Setup) -> None:
    states = [p.quant_state for p in setup.model.parameters() if getattr(p, "quant_state", None)]
    for state in states:
        state.absmax.mul_(2)
        state.blocksize = 1
    states[0].code = torch.zeros(16)


def _attributes(setup: Setup) -> None:
    model = setup.model
    model.notes["losses"][1].append(0.0)
    model.made_up = 1
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] = 99.0
    del model.get_base_model().model.norm.variance_epsilon
    model.get_base_model().model.layers[0].mlp = nn.Identity()
    other = model.get_base_model().model.layers[1].mlp
    other.hidden_size = float(other.hidden_size)  # equal to what it was, and no whole number


def _configurations(setup: Setup) -> None:
    base = setup.model.get_base_model()
    base.config.use_cache = False
    base.generation_config.temperature = 9.0
    config = setup.model.peft_config["default"]
    config.lora_alpha = 99
    config.target_modules.add("k_proj")
    config.rank_pattern["q_proj"] = 2


def _hooks_of_tensors(setup: Setup) -> None:
    for parameter in setup.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(do_nothing)
            parameter.register_post_accumulate_grad_hook(do_nothing)


def _optimizer(setup: Setup) -> None:
    state = next(iter(setup.optimizer.state.values()))
    state["exp_avg"].add_(1)
    state["other"] = 1
    setup.optimizer.param_groups[0]["lr"] = 7.0
    setup.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    setup.optimizer.state = {}


def _random(setup: Setup) -> None:
    random.random(), np.random.rand(), torch.rand(1)


def _precision(setup: Setup) -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32


def _autocast(setup: Setup) -> None:
    torch.autocast("cpu", dtype=torch.float16).__enter__()
    torch.set_autocast_enabled("cuda", True)


def _deterministic(setup: Setup) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True


def _filters(setup: Setup) -> None:
    warnings.catch_warnings().__enter__()
    warnings.simplefilter("error")
    warnings.showwarning = do_nothing


def _levels(setup: Setup) -> None:
    logging.root.setLevel(1)
    logging.getLogger("transformers").setLevel(1)
    logging.getLogger("peft").disabled = True


def _handlers(setup: Setup) -> None:
    logging.root.handlers = [logging.NullHandler()]
    logging.getLogger("peft").addHandler(logging.NullHandler())
    logging.getLogger("transformers").propagate = not logging.getLogger("transformers").propagate


def _environment(setup: Setup) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "perhaps"
    os.environ.pop("PATH", None)


ATTACKS: dict[str, Callable[[Setup], object]] = {
    "weights": _weights,
    "buffers": lambda s: [b.mul_(2) for b in s.model.buffers()],
    "gradients": _gradients,
    "requires_grad": lambda s: [p.requires_grad_(False) for p in s.model.parameters()],
    "quantization states": _quantization,
    "tensor hooks": _hooks_of_tensors,
    "modes": lambda s: s.model.eval(),
    "attributes of modules": _attributes,
    "classes of modules": lambda s: setattr(s.model.get_base_model().lm_head, "__class__", nn.Identity),
    "configurations": _configurations,
    "module hooks": lambda s: [m.register_forward_pre_hook(do_nothing) for m in s.model.modules()],
    "optimizer": _optimizer,
    "scheduler": lambda s: s.scheduler.step(),
    "scaler": lambda s: s.scaler.update(3.0),
    "generators": lambda s: torch.rand(1, generator=s.batches.generator),
    "batches": lambda s: (s.batches.batch["input_ids"].zero_(), s.batches.batch.pop("labels")),
    "random states": _random,
    "float32 precision": _precision,
    "default dtype": lambda s: torch.set_default_dtype(torch.float64),
    "default device": lambda s: torch.set_default_device("meta"),
    "autocast": _autocast,
    "deterministic algorithms": _deterministic,
    "anomaly detection": lambda s: torch.autograd.set_detect_anomaly(True),
    "grad mode": lambda s: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "number of threads": lambda s: torch.set_num_threads(torch.get_num_threads() + 1),
    "warning filters": _filters,
    "logging levels": _levels,
    "logging handlers": _handlers,
    "environment variables": _environment,
    "garbage collection": lambda s: gc.disable() if gc.isenabled() else gc.enable(),
    "disabled logging": lambda s: logging.disable(logging.CRITICAL),
    "signal handlers": lambda s: signal.signal(signal.SIGUSR1, do_nothing),
}


def test_every_entry_is_attacked() -> None:
    assert list(ATTACKS) == list(KEPT)


@pytest.fixture(scope="module")
def setup() -> Setup:
    """One for all: none of the tests changes it, or they fail."""
    torch.manual_seed(0)
    return amid_training("base_4bit", _Attacked)


class _Attacked(torch.optim.AdamW):
    """An optimizer whose step does something more."""

    def step(self, closure: Any = None) -> Any:
        for attack in self.__class__.attacks:
            attack()
        return super().step(closure)

    attacks: tuple[Callable[[], None], ...] = ()


Place = Callable[[Setup, Callable[[], None], pytest.MonkeyPatch], dict[str, Any]]


def _in_loss(setup: Setup, attack: Callable[[], None], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        attack()
        found: torch.Tensor = model(**batch).loss
        return found

    return {"loss_fn": loss}


def _in_forward(setup: Setup, attack: Callable[[], None], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    kind = type(setup.model.get_base_model())
    forward = kind.forward

    def attacked(self: Any, *args: Any, **kwargs: Any) -> Any:
        attack()
        return forward(self, *args, **kwargs)

    patch.setattr(kind, "forward", attacked)
    return {}


def _in_iterator(setup: Setup, attack: Callable[[], None], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    own = type(setup.batches).__iter__

    def attacked(self: Any) -> Iterator[Any]:
        for number, batch in enumerate(own(self)):
            if number:
                attack()
            yield batch

    patch.setattr(type(setup.batches), "__iter__", attacked)
    return {}


def _in_step(setup: Setup, attack: Callable[[], None], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(_Attacked, "attacks", (attack,))
    return {}


PLACES: dict[str, Place] = {
    "loss_fn": _in_loss,
    "forward": _in_forward,
    "data iterator": _in_iterator,
    "optimizer step": _in_step,
}


ENDS: tuple[type[BaseException] | None, ...] = (None, KeyboardInterrupt, SystemExit)
"""How an attack ends: the check goes on, or ends with this."""


def _cases() -> Iterator[Any]:
    """Every entry at every place, ended every way; the interrupt that is not a place's turn is slow."""
    for row, entry in enumerate(KEPT):
        for column, place in enumerate(PLACES):
            if (entry, place) != ("batches", "data iterator"):  # one that is in the iterator is nobody's yet
                turn = 1 + (row + column) % 2
                yield pytest.param(entry, place, (ENDS[0], ENDS[turn]), id=f"{entry}-{place}")
                yield pytest.param(
                    entry, place, (ENDS[3 - turn],), id=f"{entry}-{place}-other", marks=pytest.mark.lora_slow
                )


@pytest.mark.parametrize(("entry", "place", "ends"), list(_cases()))
def test_no_trace(
    setup: Setup,
    entry: str,
    place: str,
    ends: tuple[type[BaseException] | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = observed(setup)
    for end in ends:
        calls = []

        def attack(end: type[BaseException] | None = end, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 1:
                ATTACKS[entry](setup)
                if end is not None:
                    raise end

        with monkeypatch.context() as patch:
            arguments = PLACES[place](setup, attack, patch)
            # What an attack breaks may raise in what follows.
            with contextlib.suppress(Exception) if end is None else pytest.raises(end):
                check_training(setup.model, setup.batches, **setup.trainers, **arguments)
            after = observed(setup)
        assert calls
        assert (end, changed(before, after)) == (end, [])


@pytest.mark.parametrize("entry", [setting.name for setting in SETTINGS])
def test_a_keeper_without_a_model_keeps_the_process(setup: Setup, entry: str) -> None:
    """Contexts of torch that a check is in restore some of it too, and must not be what is seen here."""
    before = observed(setup)
    with Keeper():
        ATTACKS[entry](setup)
    assert changed(before, observed(setup)) == []


@pytest.mark.parametrize("entry", KEPT)
def test_an_attack_is_seen(entry: str) -> None:
    """The tests above would pass if attacks did nothing, or nobody saw what they do."""
    setup = amid_training("base_4bit")
    process, handlers = Process(), {n: signal.getsignal(n) for n in (signal.SIGUSR1,)}
    before = observed(setup)
    assert changed(before, observed(setup)) == []
    try:
        ATTACKS[entry](setup)
        seen = changed(before, observed(setup)) if entry != "default device" else [entry]
    finally:
        process.restore()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert entry in seen
