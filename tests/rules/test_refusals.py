"""What PEFT refuses is known beforehand, and so is what it takes."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config
from torch import nn

from pytest_lora import Expect, check_checkpoint, check_config, check_model
from pytest_lora.bases.examples.models import BASES

FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}
NEWEST = Version(peft.__version__) >= Version("0.21")


def made(kind: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(64, 64),
        "without bias": lambda: nn.Linear(64, 64, bias=False),
        "embedding": lambda: nn.Embedding(64, 64),
        "convolution": lambda: nn.Conv2d(8, 8, 3),
        "in groups": lambda: nn.Conv2d(8, 8, 3, groups=2),
        "3d": lambda: nn.Conv3d(8, 8, 3),
        "attention": lambda: nn.MultiheadAttention(32, 4),
    }
    return nn.ModuleDict({"layer": layers[kind](), "other": nn.Linear(64, 64)})


INITS = [
    True,
    "gaussian",
    "pissa",
    "pissa_niter_4",
    "pissa_niter_x",
    "pissa_other",
    "olora",
    "orthogonal",
    "eva",
    "mica",
    "nonsense",
]
VARIANTS = {
    "kasa_config": lambda: lora_config.KasaConfig(),
    "velora_config": lambda: lora_config.VeloraConfig(num_groups=2, init_type="random"),
}


def cases() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"init_lora_weights": init} for init in INITS]
    return found + [{name: make} for name, make in VARIANTS.items() if name in FIELDS]


def asked(fields: dict[str, Any], rank: int) -> LoraConfig:
    values = {name: value() if callable(value) else value for name, value in fields.items()}
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], **values)


@pytest.mark.parametrize(
    "fields",
    cases(),
    ids=lambda fields: "-".join(k if callable(v) else f"{k}={v}" for k, v in fields.items()),
)
@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution", "attention"])
@pytest.mark.parametrize("rank", [3, 4, 64, 65])
def test_the_verdict_is_that_of_peft(fields: dict[str, Any], kind: str, rank: int) -> None:
    config = asked(fields, rank)
    report = check_config(config, made(kind))
    assert (not report.errors) == _is_taken(config, made(kind)), report


def _is_taken(config: LoraConfig, base: nn.Module) -> bool:
    try:
        get_peft_model(base, copy.deepcopy(config))
    except Exception:
        return False
    return True


def test_lora_ga_without_its_config_is_refused_where_the_gradients_are_there() -> None:
    base = made("linear")
    base["layer"]._peft_loraga_grad = torch.randn(64, 64)
    config = LoraConfig(r=4, target_modules=["layer"], init_lora_weights="lora_ga")
    if "lora_ga_config" not in FIELDS:
        pytest.skip("this PEFT has no LoRA-GA")
    (found,) = check_config(config, base).errors
    assert (found.code, found.fix) == (
        "LORA124",
        "set lora_ga_config to a LoraGAConfig, or init_lora_weights=True",
    )


@pytest.mark.parametrize("rank", [4, 32, 40])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_is_taken_where_twice_the_rank_fits(direction: str, rank: int) -> None:
    if "lora_ga_config" not in FIELDS:
        pytest.skip("this PEFT has no LoRA-GA")
    fields = {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": lambda: lora_config.LoraGAConfig(direction=direction),
    }

    def base() -> nn.ModuleDict:
        prepared = made("linear")
        prepared["layer"]._peft_loraga_grad = torch.randn(64, 64)
        return prepared

    taken = _is_taken(asked(fields, rank), base())
    assert taken == (not check_config(asked(fields, rank), base()).errors)
    assert taken or rank == 40


def test_what_peft_is_asked_leaves_random_numbers_alone() -> None:
    embedding, linear = made("embedding"), made("linear")
    for fields in ({"init_lora_weights": True}, {"init_lora_weights": "pissa_niter_4"}):
        before = torch.random.get_rng_state()
        check_config(asked(fields, 4), embedding)
        check_config(asked(fields, 4), linear)
        assert torch.equal(before, torch.random.get_rng_state())


def test_a_checkpoint_with_an_embedding_leaves_random_numbers_alone(tmp_path: Path) -> None:
    get_peft_model(made("embedding"), asked({}, 4)).save_pretrained(tmp_path)
    base = made("embedding")
    before = torch.random.get_rng_state()
    check_checkpoint(tmp_path, base)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "kind", ["linear", "without bias", "embedding", "convolution", "in groups", "3d", "attention"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_an_impossible_merge_is_known_beforehand(kind: str, bias: bool) -> None:
    config = asked({"lora_bias": bias}, 4)
    try:
        model: Any = get_peft_model(made(kind), copy.deepcopy(config))
    except Exception:
        pytest.skip("PEFT refuses the configuration itself")
    found = check_model(model, expect=Expect(will_merge=True))
    told = [
        "LORA136" in {f.code for f in report.errors}
        for report in (check_config(config, made(kind), expect=Expect(will_merge=True)), found)
    ]
    try:
        copy.deepcopy(model).merge_and_unload()
    except Exception:
        assert told == [True, True]
    else:
        assert told == [False, False]
    assert "LORA136" not in {f.code for f in check_model(model).findings}


def test_what_is_merged_is_small_and_the_model_stays_as_it_is() -> None:
    model: Any = get_peft_model(made("in groups"), asked({}, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_model(model, expect=Expect(will_merge=True))
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


class Refused(nn.Linear):
    """A subclass that PEFT takes; its sister below it does not."""


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"q_proj": Strange(), "v_proj": Strange()})
        self.language_model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})


def test_a_tower_that_peft_refuses_is_named_with_the_exclusion_that_it_takes() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    (found,) = check_config(config, Towers()).errors
    assert found.code == "LORA124"
    assert "vision_tower.q_proj" in found.observed
    assert found.fix == "set exclude_modules='.*(vision_tower).*', with which PEFT takes the rest"
    config.exclude_modules = ".*(vision_tower).*"
    assert not check_config(config, Towers()).errors


def test_a_refusal_is_not_hidden_by_a_name_that_matches_nothing() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "typo"])
    assert [f.code for f in check_config(config, Towers()).errors] == ["LORA104", "LORA124"]


def test_a_second_adapter_that_peft_refuses_is_told_on_the_peft_model() -> None:
    def config(bias: Any) -> LoraConfig:
        return LoraConfig(r=2, target_modules=["layer"], bias=bias)

    model: Any = get_peft_model(made("linear"), config("lora_only"))
    refused, taken = (
        next(f for f in check_config(second, model).errors if f.code == "LORA125")
        for second in (config("lora_only"), config("none"))
    )
    assert "supports only 1 adapter with bias" in refused.observed
    assert "add_adapter" not in refused.fix
    assert "add_adapter" in taken.fix
    with pytest.raises(ValueError, match="supports only 1 adapter"):
        model.add_adapter("second", config("lora_only"))
    model.add_adapter("third", config("none"))


def saved(tmp_path: Path, **changes: Any) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(BASES["base"](), config)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return tmp_path


FIELDS_OF_A_FILE: dict[str, Any] = {
    "r": [None, "4", 4.0, 0],
    "lora_alpha": [None, "8", [8]],
    "lora_dropout": [None, "0.1", 1.5],
    "bias": [None, "other"],
    "rank_pattern": [None, [], {"q_proj": "4"}, {"q_proj": None}],
    "alpha_pattern": [None, [], {"q_proj": None}],
    "init_lora_weights": ["other"],
    "target_modules": [5, [5], {"q": 1}],
    "modules_to_save": [5],
    "peft_type": ["lora", "", None],
    "task_type": [None],
    "use_rslora": [None, 0],
    "fan_in_fan_out": [None, 0],
    "exclude_modules": [None, []],
    "layers_to_transform": [None],
    "modules_to_tie": [None],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in FIELDS_OF_A_FILE.items() for value in values]
)
def test_a_field_on_which_peft_raises_is_an_error_and_no_other(
    tmp_path: Path, field: str, value: Any
) -> None:
    path = saved(tmp_path, **{field: value})
    try:
        PeftModel.from_pretrained(BASES["base"](), str(path))
    except Exception:
        assert check_checkpoint(path, BASES["base"]()).errors
    else:
        assert not check_checkpoint(path, BASES["base"]()).errors
        assert not check_checkpoint(path).errors


REPLICATED = [[0, 2], [1, 2]]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, True),
        ({"layers_to_transform": [2]}, True),
        ({"layers_to_transform": [0]}, False),
        ({"layer_replication": [[0, 1], [1, 2]]}, False),
    ],
)
def test_copies_of_a_block_are_told_where_their_adapters_are_to_be_merged(
    changed: dict[str, Any], told: bool
) -> None:
    fields = {"layer_replication": REPLICATED, "target_modules": ["q_proj", "v_proj"], **changed}
    config = LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, **fields)
    model = get_peft_model(BASES["base"](), copy.deepcopy(config)).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids).logits
        merged = model.merge_and_unload()(ids).logits
    assert torch.allclose(before, merged, atol=1e-4) is not told
    config.init_lora_weights = True
    merging = check_config(config, BASES["base"](), expect=Expect(will_merge=True))
    assert [finding.code for finding in merging.findings] == (["LORA113"] if told else [])
    live = get_peft_model(BASES["base"](), copy.deepcopy(config))
    seen = [one.code for one in check_model(live, expect=Expect(will_merge=True)).findings]
    assert ("LORA113" in seen) is told
    assert not check_config(config, BASES["base"]()).findings
    assert "LORA113" not in [one.code for one in check_model(live).findings]


def test_layers_are_counted_after_replication() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], layer_replication=REPLICATED)
    config.layers_to_transform = [2]
    assert not check_config(config, BASES["base"]()).findings
    config.layers_to_transform = [3]
    (finding,) = check_config(config, BASES["base"]()).findings
    wanted = "numbers from 0 to 2: layer_replication makes 3 blocks, counted from 0"
    assert (finding.code, finding.expected) == ("LORA105", wanted)


def test_a_bias_that_is_no_word_is_explained() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    config.bias = None
    (finding,) = check_config(config, BASES["base"]()).findings
    assert finding.code == "LORA124"
    assert "bias='none'" in finding.fix
    config.bias = "none"
    assert not check_config(config, BASES["base"]()).findings


@pytest.mark.skipif(not NEWEST, reason="needs PEFT that refuses these modules")
def test_modules_that_kernels_bypass_are_left_out() -> None:
    base = transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=128)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["in_proj", "out_proj", "conv1d"], task_type="CAUSAL_LM"
    )
    (finding,) = check_config(config, base).findings
    assert finding.code == "LORA124"
    assert "target_modules=['in_proj']" in finding.fix
    config.target_modules = {"in_proj"}
    assert not check_config(config, base).findings
