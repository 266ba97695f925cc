"""The life of a model with adapters, as a state machine of Hypothesis over PEFT's own operations.

Needs the extra ``pytest-lora[strategies]``.
"""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pytest_lora.checks import check_model
from pytest_lora.expect import Expect
from pytest_lora.roundtrip import TOLERANCES, distance, identical, output_of
from pytest_lora.tiny import load_tiny, text_batch

NAMES = ("first", "second", "third", "fourth")
_RATE = 1e-2
_SEEDS = st.integers(0, 2**16)
_RANKS = st.integers(1, 8)
_IN_PASSING = ("LORA202", "LORA203")
"""Disabled adapters and merged ones: errors in a set-up that is to train, states in passing here."""


@cache
def _tiny_base() -> Any:
    return load_tiny(quantization=None)


class LoraLifecycle(RuleBasedStateMachine):
    """Adapters are added, activated, disabled, merged, deleted, saved, loaded, trained, combined and renamed.

    After each step every adapter gives what it gave last and the base what it gave at first: bit for bit, or within
    rounding once something was merged. And ``check_model`` finds no error. Your own model
    takes its place in three lines::

        class OwnLifecycle(LoraLifecycle):
            def make_base(self):
                return AutoModelForCausalLM.from_pretrained("path/of/my/model")

        TestOwnLifecycle = OwnLifecycle.TestCase

    Override ``make_batch`` too where the model takes something else than the built-in base does, and ``targets``
    where its modules have other names. Weights that merging rounds for good (quantized ones) do not keep these
    laws by design, so the base is not to be quantized.

    Attributes:
        targets: ``target_modules`` of the adapters.
        steps: States looked at so far by all machines, for those who count.
    """

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    steps = 0

    def make_base(self) -> Any:
        """A new base without adapter, not quantized."""
        return copy.deepcopy(_tiny_base())

    def make_batch(self) -> Any:
        """What the model is called with; it must give a loss."""
        return {name: value[:1, :16] for name, value in text_batch().items()}

    @initialize(seed=_SEEDS, rank=_RANKS)
    def begin(self, seed: int, rank: int) -> None:
        """A base with one adapter on it."""
        torch.manual_seed(seed)
        self.batch = self.make_batch()
        base = self.make_base()
        self.plain = output_of(base.eval(), self.batch)
        self.model: Any = get_peft_model(base, self._config(rank), adapter_name=NAMES[0]).eval()
        self.outputs = {NAMES[0]: self._now()}
        self.merged = self.disabled = self.rounded = False

    def _config(self, rank: int) -> LoraConfig:
        return LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(self.targets), init_lora_weights=False
        )

    def _now(self) -> Tensor:
        return output_of(self.model.eval(), self.batch)

    def _free(self) -> list[str]:
        return [name for name in NAMES if name not in self.outputs]

    def _active(self) -> str:
        active: str = self.model.active_adapter
        return active

    def _at_rest(self) -> bool:
        return not self.merged and not self.disabled

    @precondition(lambda self: self._at_rest() and self._free())
    @rule(seed=_SEEDS, rank=_RANKS)
    def add(self, seed: int, rank: int) -> None:
        """Add an adapter, and activate it."""
        torch.manual_seed(seed)
        name = self._free()[0]
        self.model.add_adapter(name, self._config(rank))
        self.model.set_adapter(name)
        self.outputs[name] = self._now()

    @precondition(lambda self: self._at_rest())
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        """Make another adapter the active one."""
        self.model.set_adapter(data.draw(st.sampled_from(sorted(self.outputs))))

    @precondition(lambda self: not self.merged)
    @rule()
    def switch(self) -> None:
        """Disable the adapters, or enable them again."""
        if self.disabled:
            self.model.base_model.enable_adapter_layers()
        else:
            self.model.base_model.disable_adapter_layers()
        self.disabled = not self.disabled

    @precondition(lambda self: self._at_rest())
    @rule()
    def merge(self) -> None:
        """Merge the active adapter into the base."""
        self.model.merge_adapter()
        self.merged = self.rounded = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        """Take it out again."""
        self.model.unmerge_adapter()
        self.merged = False

    @precondition(lambda self: self._at_rest() and len(self.outputs) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Delete an adapter that is not active."""
        others = sorted(set(self.outputs) - {self._active()})
        name = data.draw(st.sampled_from(others))
        self.model.delete_adapter(name)
        del self.outputs[name]

    @precondition(lambda self: self._at_rest() and self._free())
    @rule()
    def save_and_load(self) -> None:
        """Save the active adapter, and load it under another name."""
        source, name = self._active(), self._free()[0]
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[source])
            self.model.load_adapter(str(Path(folder) / source), adapter_name=name, is_trainable=True)
        self.outputs[name] = self.outputs[source]
        self.model.set_adapter(name)

    @precondition(lambda self: self._at_rest() and self._free())
    @rule()
    def rename(self) -> None:
        """Give the active adapter another name: save it, load it under that name, delete the old one."""
        source = self._active()
        self.save_and_load()
        self.model.delete_adapter(source)
        del self.outputs[source]

    @precondition(lambda self: self._at_rest())
    @rule()
    def train(self) -> None:
        """Take one step with the active adapter."""
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=_RATE)
        self.model(**self.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.outputs[self._active()] = self._now()

    @precondition(lambda self: self._at_rest() and self._free())
    @rule(data=st.data())
    def combine(self, data: st.DataObject) -> None:
        """Combine two adapters into a new one; a single one at weight 1 is that one again."""
        name, source = self._free()[0], data.draw(st.sampled_from(sorted(self.outputs)))
        self.model.add_weighted_adapter([source], [1.0], name, combination_type="cat")
        self.model.set_adapter(name)
        self._same(self._now(), self.outputs[source], f"adapter {source!r} at weight 1", rounded=True)
        self.outputs[name] = self._now()

    @invariant()
    def laws_hold(self) -> None:
        """Every adapter acts as it did, and so does the base."""
        LoraLifecycle.steps += 1
        if self.disabled:
            self._same(self._now(), self.plain, "disabled adapters")
            return
        active = self._active()
        self._same(self._now(), self.outputs[active], f"adapter {active!r}")
        if self.merged:
            return
        for name, expected in self.outputs.items():
            self.model.set_adapter(name)
            self._same(self._now(), expected, f"adapter {name!r}")
        self.model.set_adapter(active)
        with self.model.disable_adapter():
            self._same(self._now(), self.plain, "the base under disable_adapter")

    def _same(self, seen: Tensor, expected: Tensor, what: str, rounded: bool = False) -> None:
        """Equal bit for bit, or within rounding once something was merged."""
        if identical(seen, expected):
            return
        assert rounded or self.rounded, f"{what}: the output moved by {distance(seen, expected):.3g}"
        apart, scale = distance(seen, expected), float(expected.abs().max())
        allowed = TOLERANCES.get(seen.dtype, 0.0) * scale
        assert apart <= allowed, f"{what}: the output moved by {apart:.3g}, at most {allowed:.3g} is rounding"

    @invariant()
    def checks_pass(self) -> None:
        """``check_model`` finds no error but that adapters are merged or disabled, where they are."""
        report = check_model(self.model, expect=Expect(fresh=None))
        passing = _IN_PASSING if self.merged or self.disabled else ()
        errors = [finding for finding in report.errors if finding.code not in passing]
        assert not errors, "\n".join(map(str, errors))
