"""The base model that tests share: adapters put on and taken off, damage found, the damaged made anew."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from torch import nn

from pytest_lora.findings import grouped
from pytest_lora.inspection.quiet import warnings_only_warn
from pytest_lora.inspection.state import Damage, Snapshot
from pytest_lora.values import in_short

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from peft import LoraConfig, PeftModel

BASE = "lora_base_model"
GUARD = "_lora_base_guard"
KEPT = 4
"""Adapters kept for the next test with the same configuration."""

ADVICE = (
    "A test that trains, merges into or rebuilds the base itself needs one of its own: copy.deepcopy(lora_base_model), "
    "or a lora_base_model fixture of function scope."
)


def guard(item: Any) -> None:
    """Have the guard set up right before the function-scoped fixtures of a test, so that it ends after them."""
    names, known = item.fixturenames, item._fixtureinfo.name2fixturedefs
    first = next(
        (i for i, n in enumerate(names) if n in known and known[n][-1].scope == "function"), len(names)
    )
    names.insert(first, GUARD)


def note_start(item: Any) -> None:
    """Note that a test without a guard is about to run which could take a base by ``request``."""
    names = getattr(item, "fixturenames", ())
    if "request" in names and GUARD not in names:
        of(item.config).unwatched = True


@dataclass
class SharedBases:
    """The bases of a session, the fixtures that made them, and wider fixtures that use them."""

    bases: list[Base] = field(default_factory=list)
    made: list[tuple[pytest.FixtureDef[Any], object]] = field(default_factory=list)
    tenants: set[str] = field(default_factory=set)
    unwatched: bool = False
    """Whether something ran without a guard that may have changed a base."""

    def put_back_after_unwatched(self) -> None:
        """Put all bases back, if something without a guard may have changed one."""
        if self.unwatched:
            for base in self.bases:
                base.pristine.restore()
        self.unwatched = False

    def remember(self, fixture: pytest.FixtureDef[Any], value: object) -> None:
        """Note a fixture that was just set up, and the state of a base as its fixture made it."""
        if fixture.argname == BASE:
            self.made.append((fixture, value))
            if isinstance(value, nn.Module) and fixture.scope != "function":
                self.bases = [base for base in self.bases if base.model is not value]
                self.bases.append(Base(value))
        elif fixture.scope != "function" and self.tenants.union([BASE]).intersection(fixture.argnames):
            self.tenants.add(fixture.argname)

    def forget(self, fixture: pytest.FixtureDef[Any]) -> None:
        """Let go of what a fixture made, as it was torn down."""
        self.made = [(maker, value) for maker, value in self.made if maker is not fixture]
        alive = {id(value) for _, value in self.made}
        self.bases = [base for base in self.bases if id(base.model) in alive]

    def kept_adapters(self) -> set[int]:
        """Identities of the models with an adapter that are kept for a later test."""
        return {id(model) for base in self.bases for model, _ in base.kept()}

    def shared(self, model: nn.Module) -> Base | None:
        """The record of a model that more than one test gets; ``None`` for a test's own."""
        return next((base for base in self.bases if base.model is model), None)

    def makers(self, model: nn.Module) -> list[pytest.FixtureDef[Any]]:
        """The fixtures that made a model or a part of it."""
        parts = {id(module) for module in model.modules()}
        return [
            fixture
            for fixture, value in self.made
            if isinstance(value, nn.Module) and parts.intersection(map(id, value.modules()))
        ]


_BASES = pytest.StashKey[SharedBases]()


def of(config: pytest.Config) -> SharedBases:
    """The bases of a session."""
    return config.stash.setdefault(_BASES, SharedBases())


def enter(request: pytest.FixtureRequest) -> Guarded:
    """Begin to watch over the base of a test."""
    model = request.getfixturevalue(BASE)
    if not isinstance(model, nn.Module):
        pytest.fail(
            f"the fixture {BASE} must return a torch.nn.Module, not {type(model).__name__}", pytrace=False
        )
    bases = of(request.config)
    base = bases.shared(model)
    if base is None:
        return Guarded(Base(model), bases, is_shared=False)
    if bases.tenants.intersection(request.fixturenames):
        bases.unwatched = True  # such a fixture may end without undoing what it did
        return Guarded(Base(model), bases, has_tenant=True)
    bases.put_back_after_unwatched()
    return Guarded(base, bases)


class Base:
    """A base model: its state before any test, and adapters that were on it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pristine = Snapshot(model)
        self._kept: dict[str, tuple[PeftModel, Snapshot]] = {}

    def kept(self) -> Iterable[tuple[PeftModel, Snapshot]]:
        """The adapters that were on it, and what they were when new."""
        return self._kept.values()

    def put_on(self, config: LoraConfig) -> tuple[PeftModel, Snapshot]:
        """Put a fresh adapter on, and say what the model then is.

        The weights depend on the configuration only, and no random state is touched. On a base small enough to
        copy, the layers of an adapter are used again, put back to what they were when new.

        Raises:
            ValueError: PEFT refuses the configuration.
        """
        key = repr(vars(config))
        if key in self._kept:
            model, state = self._kept[key]
            if not state.restore():
                return model, state
        with _own_randomness(self.model), warnings_only_warn():
            try:
                made = peft.get_peft_model(self.model, copy.deepcopy(config))  # PEFT writes to it
            except Exception as error:  # whatever PEFT and torch raise for what they do not take
                raise ValueError(
                    f"lora_config: PEFT refuses it on this {type(self.model).__name__}: "
                    f"{type(error).__name__}: {in_short(error)}"
                ) from error
        state = Snapshot(made, sharing=self.pristine)
        if state.copied:
            self._kept[key] = made, state
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return made, state


@dataclass
class Guarded:
    """The base during one test."""

    base: Base
    bases: SharedBases
    is_shared: bool = True
    has_tenant: bool = False
    adapted: Snapshot | None = None
    trained: tuple[str, ...] = ()

    def put_on(self, config: LoraConfig) -> PeftModel:
        """Put an adapter on for this test; with a bias setting the base's biases may be trained."""
        model, self.adapted = self.base.put_on(config)
        self.trained = () if config.bias == "none" else ("bias",)
        return model

    def leave(self, request: pytest.FixtureRequest) -> str:
        """Put the base back.

        Returns:
            What to tell the user, empty unless the test damaged a base that others use.
        """
        pristine = self.base.pristine
        damage = pristine.damage(self.adapted, trained=self.trained)
        restored = not pristine.restore(damage.differing)
        if not self.is_shared:
            return ""
        if restored and (self.has_tenant or not damage):
            outcome = "It was put back for the next test."
        else:
            outcome = self._make_anew(request, restored)
        return damage_message(request.node.name, damage, outcome) if damage else ""

    def _make_anew(self, request: pytest.FixtureRequest, restored: bool) -> str:
        """Tear down the fixtures that made the base, so that pytest sets them up for the next test."""
        makers = self.bases.makers(self.base.model)
        message = f"The next test gets a base made anew by the fixture {BASE} of {_place(makers)}."
        if not restored:
            message += (
                " This one is too large to be put back: a fixture that returns it again returns it damaged."
            )
        subrequest: Any = request
        for maker in makers:
            try:
                maker.finish(subrequest)
            except Exception as error:  # a user's teardown; the damage is reported all the same
                message += f" Its teardown failed: {error!r}."
        return message


def _place(makers: list[pytest.FixtureDef[Any]]) -> str:
    module = makers[-1].func.__module__ if makers else ""
    return "pytest-lora" if module.startswith("pytest_lora.") else module


def damage_message(test: str, damage: Damage, outcome: str) -> str:
    """The error at the teardown of a test that damaged the base."""
    lines = [f"{test} damaged the base model that other tests share ({BASE}):"]
    if damage.merged:
        lines.append(f"  adapter left merged: {grouped(damage.merged)}")
    if damage.layers:
        lines.append(f"  layers replaced, added or removed: {grouped(damage.layers)}")
    if damage.replaced:
        lines.append(f"  parameters or buffers replaced: {_tensors(damage.replaced)}")
    if damage.contents:
        lines.append(f"  values changed: {_tensors(damage.contents)}")
    return "\n".join([*lines, outcome, ADVICE])


def _tensors(names: tuple[str, ...]) -> str:
    return grouped(names).replace(" modules: ", " tensors: ", 1)


@contextmanager
def _own_randomness(model: nn.Module) -> Iterator[None]:
    """A fixed random state of torch on the devices of the model, and all as it was afterwards."""
    devices = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        # torch.manual_seed would also seed CUDA devices that are used for the first time only later.
        torch.default_generator.manual_seed(0)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(0)
        yield
