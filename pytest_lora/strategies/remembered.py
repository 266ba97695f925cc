"""A model with adapters, what each of them gave last, and what must therefore hold of them after each step."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pytest_lora.bases.tiny import load_tiny, text_batch
from pytest_lora.checks.model import check_model
from pytest_lora.expect import Expect
from pytest_lora.inspection.behaviour import TOLERANCES, distance, identical, output_of
from pytest_lora.inspection.state import leaves_no_trace
from pytest_lora.rules import catalogue

NAMES = ("first", "second", "third", "fourth")
SEEDS = st.integers(0, 2**16)
RANKS = st.integers(1, 8)
VARIANTS = st.sampled_from(("plain", "rslora", "dora"))


@cache
def _tiny_base() -> Any:
    return load_tiny(quantization=None)


class RememberedOutputs(RuleBasedStateMachine):
    """A model with adapters whose outputs are remembered; after each step they must be the same, and the model sound.

    Attributes:
        targets: ``target_modules`` of the adapters.
        quantizes: Whether the base is packed to 4 bits on the way.
        steps: States looked at so far by all machines, for those who count.
    """

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    quantizes = True
    steps = 0

    def make_base(self) -> Any:
        """A new base without adapter, not quantized."""
        return copy.deepcopy(_tiny_base())

    def make_batch(self) -> Any:
        """What the model is called with; it must give a loss."""
        return {name: value[:1, :16] for name, value in text_batch().items()}

    @initialize(seed=SEEDS, rank=RANKS, variant=VARIANTS)
    @leaves_no_trace
    def begin(self, seed: int, rank: int, variant: str) -> None:
        """A base with one adapter on it."""
        torch.manual_seed(seed)
        self.batch = self.make_batch()
        base = self.make_base()
        self.plain = output_of(base.eval(), self.batch)
        self.model: Any = get_peft_model(base, self._config(rank, variant), adapter_name=NAMES[0]).eval()
        self.outputs = {NAMES[0]: self._now()}
        self.merged = self.disabled = self.rounded = self.quantized = self.judged = False

    def _config(self, rank: int, variant: str) -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(self.targets),
            init_lora_weights=False,
            use_rslora=variant == "rslora",
            use_dora=variant == "dora",
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

    @invariant()
    def laws_hold(self) -> None:
        """Every adapter acts as it did, and so does the base."""
        RememberedOutputs.steps += 1
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
        passing = {rule.code for rule in catalogue() if rule.passing} if self.merged or self.disabled else ()
        errors = [finding for finding in report.errors if finding.code not in passing]
        assert not errors, "\n".join(map(str, errors))
