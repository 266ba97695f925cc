"""The life of a model with adapters, as a state machine of Hypothesis over PEFT's own operations.

Needs the extra ``pytest-lora[strategies]``.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from peft import PeftModel

from pytest_lora.checks.behaviour import check_lora_laws
from pytest_lora.inspection.behaviour import output_of
from pytest_lora.inspection.behaviour.merge import COMBINATIONS, combination_error, rank_of
from pytest_lora.inspection.bitsandbytes_internals import pack_linear_layers, unpack_linear_layers
from pytest_lora.inspection.peft_internals import SVD_SCALES_TWICE, forget_adapters
from pytest_lora.inspection.peft_state import loading_device, save_adapters
from pytest_lora.inspection.state import leaves_no_trace
from pytest_lora.strategies.remembered import RANKS, SEEDS, VARIANTS, RememberedOutputs

_RATE = 1e-2
_WEIGHTS = st.sampled_from((1.0, 0.5, 2.0, -1.0))
_LARGEST_COMBINATION = 32


class LoraLifecycle(RememberedOutputs):
    """Adapters are added, activated, disabled, merged, deleted, saved, loaded, trained, combined and renamed.

    After each step every adapter gives what it gave last and the base what it gave at first: bit for bit, or within
    rounding once something was merged. And ``check_model`` finds no error. In between, the base is packed to 4 bits
    under its adapters, and the laws of ``assert_lora_laws`` are held. Your own model takes its place in three
    lines:

        class OwnLifecycle(LoraLifecycle):
            def make_base(self):
                return AutoModelForCausalLM.from_pretrained("path/of/my/model")

        TestOwnLifecycle = OwnLifecycle.TestCase

    Override ``make_batch`` too where the model takes something else than the built-in base does, and ``targets``
    where its modules have other names. Merging rounds quantized weights for good, so the base that is made is not
    to be quantized, and once the machine has packed it, merging is left to the laws, which do it on a copy.

    Attributes:
        targets: ``target_modules`` of the adapters.
        quantizes: Whether the base is packed to 4 bits on the way.
        steps: States looked at so far by all machines, for those who count.
    """

    @precondition(lambda self: self._at_rest() and self._free())
    @rule(seed=SEEDS, rank=RANKS, variant=VARIANTS)
    @leaves_no_trace
    def add(self, seed: int, rank: int, variant: str) -> None:
        """Add an adapter, and activate it."""
        torch.manual_seed(seed)
        name = self._free()[0]
        self.model.add_adapter(name, self._config(rank, variant))
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

    @precondition(lambda self: self._at_rest() and not self.quantized)
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
            save_adapters(self.model, folder, selected_adapters=[source])
            self.model.load_adapter(
                str(Path(folder) / source),
                adapter_name=name,
                is_trainable=True,
                torch_device=loading_device(self.model),
            )
        self.model.set_adapter(name)
        moved = not self._contiguous(source)
        self._same(self._now(), self.outputs[source], f"adapter {source!r}, loaded", rounded=moved)
        self.outputs[name] = self._now()

    def _contiguous(self, adapter: str) -> bool:
        """Whether its factors lie in memory as they are loaded; products of another layout round differently."""
        factors = [p for name, p in self.model.named_parameters() if f".{adapter}." in name]
        return all(factor.is_contiguous() for factor in factors)

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
    @leaves_no_trace
    def train(self) -> None:
        """Take one step with the active adapter."""
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=_RATE)
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.outputs[self._active()] = self._now()

    def _plain(self) -> list[str]:
        """Adapters that PEFT can combine: of rsLoRA and DoRA it makes something else, see docs/upstream.md."""
        configs = self.model.peft_config
        return [n for n in sorted(self.outputs) if not configs[n].use_rslora and not configs[n].use_dora]

    @precondition(lambda self: self._at_rest() and self._free() and self._plain())
    @rule(data=st.data())
    def combine(self, data: st.DataObject) -> None:
        """Combine one or two plain adapters into a new one; a single one at weight 1 is that one again."""
        name, known = self._free()[0], self._plain()
        sources = list(dict.fromkeys(data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2))))
        weights = {source: data.draw(_WEIGHTS) for source in sources}
        ranks = [rank_of(self.model, source) for source in sources]
        kinds = [kind for kind in COMBINATIONS if kind != "cat" or sum(ranks) <= _LARGEST_COMBINATION]
        if len(set(ranks)) > 1 or min(weights.values()) < 0:
            kinds.remove("linear")  # which takes adapters of one rank and, in PEFT 0.17, no negative weight
        if SVD_SCALES_TWICE:
            kinds.remove("svd")
        kind = data.draw(st.sampled_from(kinds))
        self.model.add_weighted_adapter(sources, list(weights.values()), name, combination_type=kind)
        self.model.set_adapter(name)
        self.outputs[name] = self._now()
        error = combination_error(self.model, name, weights, kind)
        assert error is None, f"{kind} of {weights}: {error}"
        if list(weights.values()) == [1.0]:
            source = sources[0]
            self._same(self._now(), self.outputs[source], f"adapter {source!r} at weight 1", rounded=True)

    @precondition(lambda self: self.quantizes and self._at_rest() and not self.quantized)
    @rule()
    def quantize(self) -> None:
        """Move the adapters to the base in 4 bits: save them, pack the base that they leave, load them there.

        They must act on it as on a base that has the same values in whole weights.
        """
        active = self._active()
        with tempfile.TemporaryDirectory() as folder:
            save_adapters(self.model, folder)
            base = self.model.unload()
            forget_adapters(base)
            self._same(output_of(base.eval(), self.batch), self.plain, "the base after unload()")
            pack_linear_layers(base)
            whole = copy.deepcopy(base)
            unpack_linear_layers(whole)
            self.model, from_whole = self._loaded(base, folder), self._loaded(whole, folder)
        for name in self.outputs:
            self.model.set_adapter(name)
            from_whole.set_adapter(name)
            self.outputs[name] = self._now()
            expected = output_of(from_whole.eval(), self.batch)
            self._same(self.outputs[name], expected, f"adapter {name!r} in 4 bits", rounded=True)
        self.model.set_adapter(active)
        with self.model.disable_adapter():
            self.plain = self._now()
        self.quantized, self.rounded = True, False

    def _loaded(self, base: Any, folder: str) -> Any:
        first, *others = self.outputs
        loading: dict[str, Any] = {"is_trainable": True, "torch_device": loading_device(base)}
        model = PeftModel.from_pretrained(base, f"{folder}/{first}", adapter_name=first, **loading)
        for name in others:
            model.load_adapter(f"{folder}/{name}", adapter_name=name, **loading)
        return model

    @precondition(lambda self: self._at_rest() and not self.judged)
    @rule()
    def hold_laws(self) -> None:
        """Hold the laws of LoRA against copies of the model, which takes as long as ten other steps: once a life."""
        self.judged = True
        errors = check_lora_laws(self.model, self.batch).errors
        assert not errors, "\n".join(map(str, errors))
