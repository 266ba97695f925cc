"""The fixtures as users take, change and override them; many scenarios share a session, as libraries load slowly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest

import pytest_lora.bases.tiny.model as tiny
from tests.plugin.sessions import run, session

CONFTEST = """
import random
import pytest, torch

def seen(model):
    "All that can be told of a model, without pytest-lora."
    tensors = {
        name: (tuple(t.shape), t.dtype, str(t.device), t.requires_grad, t.grad is None, type(t).__name__,
               t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    modules = {
        name: (type(m).__name__, m.training, len(m._forward_hooks), len(m._forward_pre_hooks),
               len(m._backward_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    }
    return tensors, modules, model.config.to_dict(), model.generation_config.to_dict()

@pytest.fixture(scope="session")
def reference():
    from pytest_lora.bases.tiny import load_tiny
    return seen(load_tiny())

@pytest.fixture
def assert_pristine(lora_base_model, reference):
    def check():
        for now, before in zip(seen(lora_base_model), reference):
            assert now.keys() == before.keys()
            assert not [key for key in now if now[key] != before[key]]
    return check

def random_states():
    import numpy
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
"""

STATE = """
import copy
import pytest, torch
from conftest import random_states
from pytest_lora import assert_lora_healthy

@pytest.mark.parametrize("turn", [1, 2])
def test_random_states_are_left_alone(request, turn):
    before = random_states()
    request.getfixturevalue("lora_model")
    request.getfixturevalue("lora_batch")
    assert random_states() == before
    torch.rand(1)

def test_first(assert_pristine): assert_pristine()

def test_unwatched_damage(request): request.getfixturevalue("lora_base_model").model.norm.weight.data.zero_()

def test_after_unwatched_damage(assert_pristine): assert_pristine()

def test_evaluation_mode(lora_model): lora_model.eval()

def test_after_evaluation_mode(lora_model): assert lora_model.training

def test_kinds(lora_base_model, lora_model, lora_batch, lora_device, lora_config, lora_expect):
    from peft import LoraConfig, PeftModelForCausalLM
    from pytest_lora import Expect
    assert type(lora_base_model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert type(lora_model) is PeftModelForCausalLM
    assert (lora_config.r, lora_config.lora_alpha, lora_config.target_modules) == (8, 16, "all-linear")
    assert lora_expect == Expect()
    assert sorted(lora_batch) == ["attention_mask", "input_ids", "labels"]
    assert all(t.shape == (4, 64) and t.device == lora_device for t in lora_batch.values())
    assert len(assert_lora_healthy(lora_model).findings) == 0

@pytest.mark.parametrize("lora_config", [4, 8, 16], indirect=True)
def test_ranks(lora_model, lora_config, request):
    rank = request.node.callspec.params["lora_config"]
    layer = lora_model.base_model.model.model.layers[4].mlp.down_proj
    assert tuple(layer.lora_A["default"].weight.shape) == (rank, 384)
    assert layer.scaling["default"] == 2
    assert lora_config.target_modules == "all-linear"

@pytest.mark.parametrize("turn", [1, 2, 3])
def test_adapters_are_always_the_same(lora_model, lora_batch, turn, pytestconfig):
    adapter = {n: p.detach().clone() for n, p in lora_model.named_parameters() if "lora_" in n}
    first = pytestconfig.__dict__.setdefault("first_adapter", adapter)
    assert all(torch.equal(first[name], adapter[name]) for name in first)
    assert not any(w.any() for name, w in adapter.items() if "lora_B" in name)
    optimizer = torch.optim.SGD([p for p in lora_model.parameters() if p.requires_grad], lr=0.1)
    lora_model(**lora_batch).loss.backward()
    optimizer.step()

def test_after_training(assert_pristine): assert_pristine()

def mess(base, model, batch):
    from peft import LoraConfig
    model.train()
    base.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    base.config.use_cache = False
    base.generation_config.max_length = 7
    base.made_up = 1
    base.model.norm.register_forward_hook(lambda *_: None)
    base.lm_head.weight.requires_grad_(True)
    base.lm_head.weight.register_hook(lambda grad: grad)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter("second")
    model(**batch).loss.backward()
    assert base.lm_head.weight is not None

def test_mess(lora_base_model, lora_model, lora_batch): mess(lora_base_model, lora_model, lora_batch)

def test_after_mess(assert_pristine): assert_pristine()

def test_adapter_after_mess(lora_model):
    assert list(lora_model.peft_config) == ["default"]
    assert lora_model.active_adapters == ["default"]
    assert not [n for n, _ in lora_model.named_parameters() if "second" in n]

@pytest.mark.lora(modules_to_save=["lm_head"], target_modules=["q_proj"])
def test_saved_modules(lora_model, lora_batch):
    optimizer = torch.optim.SGD([p for p in lora_model.parameters() if p.requires_grad], lr=0.1)
    lora_model(**lora_batch).loss.backward()
    optimizer.step()

def test_after_saved_modules(assert_pristine): assert_pristine()

def test_own_adapter(lora_base_model):
    from peft import LoraConfig, get_peft_model
    get_peft_model(lora_base_model, LoraConfig(r=2, target_modules=["q_proj"]))

def test_after_own_adapter(assert_pristine): assert_pristine()

def norm_by_data(base, model): base.model.norm.weight.data[3] = 5.0
def packed_weight(base, model): base.model.layers[1].mlp.up_proj.weight.data[0] ^= 1
def quantization_scale(base, model): base.model.layers[1].mlp.up_proj.weight.quant_state.absmax[0] += 1
def negative_zero(base, model): base.model.embed_tokens.weight.data[319, 0].mul_(-1)
def buffer(base, model): base.model.rotary_emb.inv_freq[0] = 2.0
def dtype(base, model): base.lm_head.half()
def parameter(base, model): base.model.norm.weight = torch.nn.Parameter(base.model.norm.weight.clone())
def head(base, model): base.lm_head = copy.deepcopy(base.lm_head)
def layer(base, model): del base.model.layers[4]
def class_swap(base, model):
    class Norm(type(base.model.norm)): pass
    base.model.norm.__class__ = Norm
def embeddings(base, model): base.resize_token_embeddings(330)
def merged(base, model): model().merge_adapter()
def merged_and_unloaded(base, model): model().merge_and_unload()
def saved_head(base, model):
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(base, config).unload()

KINDS = [norm_by_data, packed_weight, quantization_scale, buffer, dtype, parameter, head, layer, class_swap,
         embeddings, merged, merged_and_unloaded, saved_head]

@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestDamage:
    def test_does(self, lora_base_model, request, kind):
        request.config.damaged = lora_base_model
        kind(lora_base_model, lambda: request.getfixturevalue("lora_model"))

    def test_next_is_clean(self, lora_base_model, assert_pristine, pytestconfig, kind):
        assert lora_base_model is not pytestconfig.damaged
        assert_pristine()
"""

OTHERS = """
import copy
import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

NETWORK = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
ORIGINAL = copy.deepcopy(NETWORK.state_dict())

def is_original(model):
    return all(torch.equal(value, ORIGINAL[name]) for name, value in model.state_dict().items())

def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(torch.arange(12.0).reshape(3, 4).sin()).pow(2).sum().backward()
    optimizer.step()

class TestFolder:
    def test_base(self, lora_base_model): assert lora_base_model[0].in_features == 3

    @pytest.mark.lora(r=2)
    def test_adapter(self, lora_model):
        assert type(lora_model) is PeftModel
        assert set(lora_model.targeted_module_names) == {"0"}

class TestClassLevel:
    @pytest.fixture(scope="class")
    def lora_base_model(self): return NETWORK

    def test_trains(self, lora_model): step(lora_model)
    def test_is_put_back(self, lora_base_model): assert is_original(lora_base_model)
    def test_damages(self, lora_base_model): lora_base_model[2].weight.data.zero_()
    def test_is_put_back_again(self, lora_base_model): assert is_original(lora_base_model)

    @pytest.mark.lora(bias="all")
    def test_biases(self, lora_model): step(lora_model)
    def test_biases_are_put_back(self, lora_base_model): assert is_original(lora_base_model)

    @pytest.mark.lora(init_lora_weights="pissa", r=2)
    @pytest.mark.parametrize("turn", [1, 2])
    def test_pissa(self, lora_model, turn):
        assert not torch.equal(lora_model.base_model.model[0].base_layer.weight, ORIGINAL["0.weight"])
    def test_residual_is_put_back(self, lora_base_model): assert is_original(lora_base_model)

class TestFunctionLevel:
    @pytest.fixture
    def lora_base_model(self): return nn.Sequential(nn.Linear(4, 8))

    def test_may_do_anything(self, lora_model, lora_base_model):
        lora_model.merge_and_unload()
        lora_base_model[0].weight.data.zero_()

class TestPretrained:
    @pytest.fixture(scope="class")
    def lora_base_model(self):
        from transformers import BertConfig, BertForSequenceClassification
        return BertForSequenceClassification(
            BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        )

    def test_bert(self, lora_model, lora_batch):
        assert lora_batch["input_ids"].max() < 50
        lora_model(lora_batch["input_ids"]).logits.sum().backward()

class TestBuiltIn:
    @pytest.fixture(scope="class")
    def lora_base_model(self, lora_base_model):
        return lora_base_model.append(nn.Tanh())

    def test_override_of_an_override(self, lora_base_model): assert len(lora_base_model) == 2

class TestLentToAWiderFixture:
    @pytest.fixture(scope="class")
    def lora_base_model(self): return copy.deepcopy(NETWORK)

    @pytest.fixture(scope="class")
    def trained(self, lora_base_model):
        model = get_peft_model(lora_base_model, LoraConfig(r=2, target_modules=["0"]))
        step(model)
        return model

    def test_takes(self, trained): assert trained.base_model.model[0].lora_B["default"].weight.any()
    def test_takes_again(self, trained): assert trained.base_model.model[0].lora_B["default"].weight.any()

    def test_damages(self, trained): trained.merge_adapter()
    def test_is_put_back(self, trained):
        assert trained.base_model.model[0].lora_B["default"].weight.any()
        assert not trained.base_model.model[0].merged

class TestWrongKind:
    @pytest.fixture
    def lora_base_model(self): return "llama"

    def test_it(self, lora_model): ...
"""

FOLDER_CONFTEST = """
import pytest
from torch import nn

@pytest.fixture(scope="session")
def lora_base_model(): return nn.Sequential(nn.Linear(3, 4))
"""

ADVICE = (
    "A test that trains, merges into or rebuilds the base itself needs one of its own: "
    "copy.deepcopy(lora_base_model), or a lora_base_model fixture of function scope."
)
ANEW = "The next test gets a base made anew by the fixture lora_base_model of {}."


def teardown_errors(lines: list[str]) -> dict[str, list[str]]:
    """The lines below each "ERROR at teardown of", by test."""
    errors: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if line.startswith(("__", "==")):
            current = []
            if found := re.search(r"ERROR at teardown of (\S+)", line):
                current = errors.setdefault(found[1], [])
        elif not line.startswith(("[gw", "---")):
            current.append(line)
    return errors


@pytest.mark.parametrize("mode", ["plain", pytest.param("xdist", marks=pytest.mark.lora_slow)])
def test_the_shared_base_survives_its_tests(pytester: pytest.Pytester, mode: str) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_state=STATE)
    others = pytester.mkpydir("others")
    (others / "conftest.py").write_text(FOLDER_CONFTEST)
    (others / "test_others.py").write_text(OTHERS)
    result = session(pytester, mode)
    errors = teardown_errors(result.outlines)
    result.assert_outcomes(passed=66, errors=16)
    changed = {
        "norm_by_data": "values changed: model.norm.weight",
        "packed_weight": "values changed: model.layers.1.mlp.up_proj.weight",
        "quantization_scale": "values changed: model.layers.1.mlp.up_proj.weight.quant_state.absmax",
        "buffer": "values changed: model.rotary_emb.inv_freq",
        "dtype": "values changed: lm_head.weight",
        "parameter": "parameters or buffers replaced: model.norm.weight",
        "head": "layers replaced, added or removed: lm_head",
        "layer": "layers replaced, added or removed: model.layers.4",
        "class_swap": "layers replaced, added or removed: model.norm",
        "saved_head": "layers replaced, added or removed: lm_head",
    }
    for kind, what in changed.items():
        assert errors[f"TestDamage.test_does[{kind}]"] == [
            f"test_does[{kind}] damaged the base model that other tests share (lora_base_model):",
            f"  {what}",
            ANEW.format("pytest-lora"),
            ADVICE,
        ]
    merged = errors["TestDamage.test_does[merged]"]
    assert merged[1].startswith("  adapter left merged: 35 modules: model.layers.*.self_attn.q_proj, ")
    assert merged[2].startswith(
        "  parameters or buffers replaced: 35 tensors: model.layers.*.self_attn.q_proj.weight, "
    )
    assert errors["TestClassLevel.test_damages"] == [
        "test_damages damaged the base model that other tests share (lora_base_model):",
        "  values changed: 2.weight",
        ANEW.format("others.test_others"),
        ADVICE,
    ]
    assert errors["TestLentToAWiderFixture.test_damages"][-2:] == [
        "It was put back for the next test.",
        ADVICE,
    ]
    assert "the fixture lora_base_model must return a torch.nn.Module, not str" in result.outlines


def test_a_local_folder_takes_the_place_of_the_built_in_base(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_local="""
        from pytest_lora import assert_lora_healthy

        def test_it(lora_model, lora_base_model, lora_batch):
            assert lora_base_model.name_or_path == NAME
            assert lora_base_model.model.layers[0].mlp.up_proj.base_layer.weight.quant_state.quant_type == "nf4"
            assert not any(p.requires_grad for n, p in lora_model.named_parameters() if "lora_" not in n)
            assert lora_model(**lora_batch).loss < 5
            assert_lora_healthy(lora_model)
        """.replace("NAME", repr(str(tiny.WEIGHTS)))
    )
    pytester.makeini(f"[pytest]\nlora_model = {tiny.WEIGHTS}\n")
    run(pytester).assert_outcomes(passed=1)


def test_the_file_of_the_base_is_mapped_so_that_workers_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs the system to list what is mapped")
    quantize, mapped = bitsandbytes.functional.quantize_4bit, []

    def look(*args: Any, **kwargs: Any) -> Any:
        mapped.append(str(tiny.WEIGHTS / "model.safetensors") in maps.read_text())
        return quantize(*args, **kwargs)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", look)
    tiny.load_tiny()
    assert mapped
    assert all(mapped)


def test_what_libraries_are_going_to_change_is_not_shown_where_the_adapter_is_made(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("def test_it(lora_model): assert lora_model.peft_config")
    result = run(pytester, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*FutureWarning*")
