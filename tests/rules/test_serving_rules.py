"""Rules on servers: at least two adapters that each refuses, drops or rescales, and two that it serves."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from pytest_lora import Expect, Report, check_checkpoint, check_config
from pytest_lora.bases.examples.folders import configure, edit, pickle_weights
from pytest_lora.bases.examples.models import BASES
from pytest_lora.expect import Serve
from pytest_lora.facts.served import padded
from pytest_lora.facts.servers import SERVERS
from tests.namespace import Namespace

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PISSA = {"init_lora_weights": "pissa"}

FAULTY: list[tuple[str, str, str, dict[str, Any]]] = [
    ("vllm", "LORA461", "DoRA", {"use_dora": True}),
    ("vllm", "LORA461", "biases of the base", {"bias": "lora_only"}),
    ("vllm", "LORA461", "embeddings saved in full", {"modules_to_save": ["lm_head"]}),
    ("vllm", "LORA461", "modules saved in full", {"modules_to_save": ["norm"]}),
    ("vllm", "LORA461", "trained token rows", {"trainable_token_indices": [3, 4]}),
    ("vllm", "LORA461", "a bias of lora_B", {"lora_bias": True}),
    ("vllm", "LORA464", "rank 20", {"r": 20}),
    ("sglang", "LORA461", "DoRA", {"use_dora": True}),
    ("sglang", "LORA462", "biases of the base", {"bias": "lora_only"}),
    ("sglang", "LORA461", "attention without q_proj or v_proj", {"target_modules": ["q_proj"]}),
    ("sglang", "LORA461", "ranks of their own", {"rank_pattern": {"v_proj": 4}}),
    ("sglang", "LORA461", "a pattern for target_modules", {"target_modules": r".*\.(q|v)_proj"}),
    ("sglang", "LORA461", "attention without q_proj or v_proj", {"target_modules": ["k_proj", "v_proj"]}),
    ("sglang", "LORA463", "rsLoRA", {"use_rslora": True}),
    ("sglang", "LORA463", "alphas of their own", {"alpha_pattern": {"v_proj": 4}}),
    ("sglang", "LORA462", "embeddings saved in full", {"modules_to_save": ["lm_head"]}),
    ("lorax", "LORA462", "DoRA", {"use_dora": True}),
    ("lorax", "LORA462", "a target on some of the layers", {"layers_to_transform": [1]}),
    ("lorax", "LORA463", "a rank that it pads", {"r": 4}),
    ("lorax", "LORA463", "alphas of their own", {"alpha_pattern": {"v_proj": 4}}),
    ("tgi", "LORA462", "a target that it does not know (lm_head)", {"target_modules": ["q_proj", "lm_head"]}),
    ("tgi", "LORA462", "LoRA on an embedding", {"target_modules": ["q_proj", "embed_tokens"]}),
    (
        "tgi",
        "LORA461",
        "ranks that differ between layers",
        {"rank_pattern": {"layers.0.self_attn.q_proj": 32}},
    ),
    ("llama.cpp", "LORA461", "DoRA", {"use_dora": True}),
    ("llama.cpp", "LORA461", "embeddings saved in full", {"modules_to_save": ["embed_tokens"]}),
    ("llama.cpp", "LORA463", "rsLoRA", {"use_rslora": True}),
    ("llama.cpp", "LORA463", "alphas of their own", {"alpha_pattern": {"v_proj": 4}}),
    ("mlx", "LORA465", "a format of its own", {}),
    ("mlx", "LORA461", "biases of the base", {"bias": "lora_only"}),
    ("transformers", "LORA462", "DoRA", {"use_dora": True}),
]

HEALTHY: list[tuple[str, dict[str, Any]]] = [
    ("vllm", {"target_modules": ALL_LINEAR}),
    ("vllm", {"use_rslora": True, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 8}}),
    ("vllm", {"target_modules": ["q_proj", "embed_tokens"], "r": 16}),
    ("sglang", {"target_modules": ALL_LINEAR}),
    ("sglang", {"target_modules": "all-linear", "r": 20}),
    ("sglang", {"target_modules": ["o_proj", "gate_proj"]}),
    ("lorax", {"target_modules": ALL_LINEAR, "use_rslora": True}),
    ("lorax", {"r": 4, "target_modules": ["q_proj"]}),
    ("lorax", {"r": 32, "target_modules": r".*\.(q|v)_proj"}),
    ("tgi", {"r": 16, "target_modules": ALL_LINEAR}),
    ("tgi", {"use_rslora": True}),
    ("llama.cpp", {"target_modules": ALL_LINEAR, "r": 20}),
    ("llama.cpp", {"rank_pattern": {"v_proj": 4}, "layers_to_transform": [1]}),
    ("transformers", {"bias": "lora_only", "modules_to_save": ["lm_head"], "use_rslora": True}),
    ("transformers", {"rank_pattern": {"v_proj": 4}, "trainable_token_indices": [3, 4]}),
]


@pytest.fixture
def names(tmp_path: Path) -> Namespace:
    return Namespace(tmp_path)


def served(path: Path, server: Serve, **fields: Any) -> Report:
    return check_checkpoint(path, expect=Expect(serve=server, **fields), select=["LORA415", "LORA46"])


def mlx(path: Path, **fields: Any) -> Path:
    """A folder as mlx_lm.lora saves it."""
    path.mkdir()
    written = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
        "model": "org/tiny-llama",
        **fields,
    }
    (path / "adapter_config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    layer = "model.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_a": torch.randn(64, 8), f"{layer}.lora_b": torch.randn(8, 64)},
        path / "adapters.safetensors",
    )
    return path


def test_every_server_has_a_table() -> None:
    assert get_args(Serve) == tuple(SERVERS)
    for server in SERVERS.values():
        assert all((server.version, server.source, server.features))


@pytest.mark.parametrize(("server", "code", "words", "fields"), FAULTY)
def test_what_a_server_does_otherwise(
    names: Namespace, server: Serve, code: str, words: str, fields: dict[str, Any]
) -> None:
    report = served(names.adapter(**fields), server)
    found = [finding for finding in report.findings if words in finding.observed]
    assert [finding.code for finding in found] == [code]
    assert SERVERS[server].name in found[0].observed
    others = {finding.code for finding in report.findings} - {code}
    assert others <= ({"LORA465"} if server == "mlx" else set()), str(report)


@pytest.mark.parametrize(("server", "fields"), HEALTHY)
def test_what_a_server_serves(names: Namespace, server: Serve, fields: dict[str, Any]) -> None:
    assert not served(names.adapter(**fields), server).findings


@pytest.mark.parametrize("server", ["vllm", "sglang", "lorax"])
def test_what_a_server_serves_on_its_base(names: Namespace, server: Serve) -> None:
    expect, path = Expect(serve=server), names.adapter(target_modules=ALL_LINEAR)
    assert not check_checkpoint(path, names["base"], expect=expect, select=["LORA46"]).findings


@pytest.mark.parametrize("fields", [{"use_dora": True, "bias": "all"}, {"r": 99, "use_rslora": True}])
def test_without_a_server_nothing_is_said(names: Namespace, fields: dict[str, Any]) -> None:
    assert not check_checkpoint(names.adapter(**fields), select=["LORA46"]).findings


@pytest.mark.parametrize("server", ["vllm", "sglang", "lorax", "tgi", "llama.cpp", "transformers"])
def test_adapters_of_mlx_are_for_mlx(tmp_path: Path, server: Serve) -> None:
    path = mlx(tmp_path / "mlx")
    assert not served(path, "mlx").findings
    assert not served(mlx(tmp_path / "dora", fine_tune_type="dora"), "mlx").findings
    (found,) = served(path, server).findings
    assert (found.code, found.severity) == ("LORA415", "error")
    assert "lora_alpha=scale * rank" in found.fix


def test_a_folder_of_mlx_that_lacks_a_part(tmp_path: Path) -> None:
    (found,) = served(mlx(tmp_path / "old", num_layers=None), "mlx").findings
    assert (found.code, "num_layers" in found.observed) == ("LORA465", True)


def test_keys_and_files(names: Namespace) -> None:
    bare = edit(names.adapter(), lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    assert [f.code for f in served(bare, "tgi").findings] == ["LORA462"]
    assert not served(bare, "vllm").findings
    named = edit(names.adapter(), lambda t: {k.replace(".weight", ".sql.weight"): v for k, v in t.items()})
    assert [f.code for f in served(named, "vllm").findings] == ["LORA461"]
    pickled = pickle_weights(names.adapter())
    assert [f.code for f in served(pickled, "tgi").findings] == ["LORA461"]
    assert not served(pickled, "vllm").findings


@pytest.mark.parametrize(
    ("rank", "limit", "severity", "words"),
    [
        (32, None, "warning", "start it with --max-lora-rank 32"),
        (20, 16, "error", "start it with --max-lora-rank 32"),
        (8, 24, "error", "start it with --max-lora-rank 32"),
        (600, 512, "error", "no limit reaches 600"),
        (16, None, None, ""),
        (600, None, "error", "no limit reaches 600"),
    ],
)
def test_the_rank_limit_of_vllm(
    names: Namespace, rank: int, limit: int | None, severity: str | None, words: str
) -> None:
    path = configure(names.adapter(), rank_pattern={"q_proj": rank}) if rank > 64 else names.adapter(r=rank)
    if rank > 64:
        edit(path, lambda t: {k: v.repeat(75, 1) if "lora_A" in k else v.repeat(1, 75) for k, v in t.items()})
    found = served(path, "vllm", max_lora_rank=limit).findings
    assert [f.severity for f in found] == ([severity] if severity else [])
    assert all(f.code == "LORA464" and words in f.fix for f in found)


def test_a_configuration_is_judged_before_training(names: Namespace) -> None:
    config = LoraConfig(target_modules=["q_proj"], use_dora=True, r=64)
    report = check_config(
        config, names["base"], expect=Expect(serve="vllm", max_lora_rank=32), select=["LORA46"]
    )
    assert [f.code for f in report.findings] == ["LORA461", "LORA464"]
    assert not check_config(config, names["base"], select=["LORA46"]).findings
    half = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[0])
    report = check_config(half, names["base"], expect=Expect(serve="lorax"), select=["LORA46"])
    assert [f.code for f in report.findings] == ["LORA462"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"serve": "ollama"}, "serve must be one of vllm, sglang"),
        ({"max_lora_rank": 16}, "say which with serve"),
        ({"serve": "vllm", "max_lora_rank": 0}, "max_lora_rank must be at least 1"),
    ],
)
def test_wrong_servers_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Expect(**given)


def logits(path: Path, base: torch.nn.Module) -> torch.Tensor:
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(1, 17)[None]).logits
    return found


def test_rslora_written_without_rslora_is_the_same_adapter(names: Namespace) -> None:
    path = names.adapter(use_rslora=True, r=8, lora_alpha=16)
    before = logits(path, names["base"])
    assert "use_rslora=False, lora_alpha=45.254834" in served(path, "llama.cpp").findings[0].fix
    configure(path, use_rslora=False, lora_alpha=16 * math.sqrt(8))
    assert not served(path, "llama.cpp").findings
    assert torch.allclose(logits(path, names["base"]), before, atol=1e-6)


def test_a_rank_padded_by_hand_is_the_same_adapter(names: Namespace) -> None:
    path = names.adapter(r=4, lora_alpha=16)
    before = logits(path, names["base"])
    assert "write r=8 and lora_alpha=32" in served(path, "lorax").findings[0].fix
    pad = {"lora_A": (0, 0, 0, 4), "lora_B": (0, 4)}
    edit(
        path,
        lambda t: {
            k: torch.nn.functional.pad(v, pad["lora_A" if "lora_A" in k else "lora_B"]) for k, v in t.items()
        },
    )
    configure(path, r=8, lora_alpha=32)
    assert not served(path, "lorax").findings
    assert torch.allclose(logits(path, names["base"]), before, atol=1e-6)
    assert [padded(rank) for rank in (1, 8, 9, 16, 17, 64)] == [8, 8, 16, 16, 32, 64]


ELSEWHERE = {
    "kohya-ss": "lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight",
    "diffusers": "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "AdapterHub": "bert.encoder.layer.0.attention.self.query.loras.sst.lora_A",
    "torchtune": "layers.0.attn.q_proj.lora_a.weight",
    "mlx-lm": "model.layers.0.self_attn.q_proj.lora_a",
}


@pytest.mark.parametrize("tool", ELSEWHERE)
def test_files_of_other_tools_are_named_whatever_they_are_called(tmp_path: Path, tool: str) -> None:
    save_file({ELSEWHERE[tool]: torch.randn(4, 8)}, tmp_path / "my_style.safetensors")
    (found,) = check_checkpoint(tmp_path).findings
    assert found.code == "LORA415"
    assert f"an adapter of {tool}" in found.observed
    assert "rename" not in found.fix
    assert "peft_type" not in found.fix


@pytest.mark.parametrize(
    ("tool", "file"),
    [
        ("AdapterHub", "pytorch_adapter.bin"),
        ("torchtune", "adapter_0.pt"),
        ("diffusers", "pytorch_lora_weights.bin"),
    ],
)
def test_pickles_of_other_tools_are_named_by_their_files(tmp_path: Path, tool: str, file: str) -> None:
    (tmp_path / file).write_bytes(b"not opened")
    found = [f for f in check_checkpoint(tmp_path).findings if f.code == "LORA415"]
    assert [f"an adapter of {tool}" in f.observed for f in found] == [True]


def test_a_configuration_of_adapterhub_is_not_one_of_peft(tmp_path: Path) -> None:
    written = {"config": {"architecture": "lora", "r": 8, "alpha": 16}, "model_class": "BertAdapterModel"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"")
    findings = [f for f in check_checkpoint(tmp_path).findings if f.severity != "info"]
    assert [(f.code, "AdapterHub" in f.observed) for f in findings] == [("LORA415", True)]


def test_a_lone_file_without_such_keys_is_still_without_its_configuration(names: Namespace) -> None:
    path = names.adapter()
    (path / "adapter_model.safetensors").rename(path / "weights.safetensors")
    (path / "adapter_config.json").unlink()
    assert "LORA411" in [f.code for f in check_checkpoint(path).errors]


def unswapped(tensors: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """Packed experts with their sides exchanged, as the advice of LORA433 says."""
    (a,), (b,) = ([k for k in tensors if part in k] for part in ("lora_A", "lora_B"))
    each_a = tensors[a].reshape(experts, -1, tensors[a].shape[-1])
    each_b = tensors[b].reshape(tensors[b].shape[0], -1, experts)
    return {
        a: each_b.permute(2, 1, 0).reshape(-1, tensors[b].shape[0]),
        b: each_a.permute(2, 1, 0).reshape(tensors[a].shape[-1], -1),
    }


def test_packed_experts_whose_sides_are_swapped(names: Namespace) -> None:
    base = BASES["fused_moe_base"]()
    fields = {"task_type": None, "target_modules": [], "target_parameters": ["experts.up"]}
    path = names.adapter(on=copy.deepcopy(base), **fields)
    before = PeftModel.from_pretrained(copy.deepcopy(base), str(path)).merge_and_unload()[0].experts.up
    edit(path, lambda t: unswapped(t, 16))
    (found,) = check_checkpoint(path, base).errors
    assert (found.code, "Unsloth" in found.fix) == ("LORA433", True)
    edit(path, lambda t: unswapped(t, 16))
    assert check_checkpoint(path, base).ok
    after = PeftModel.from_pretrained(copy.deepcopy(base), str(path)).merge_and_unload()[0].experts.up
    assert torch.equal(before, after)
    assert [f.code for f in served(path, "llama.cpp").findings] == ["LORA461"]
    assert [f.code for f in served(path, "tgi").findings] == ["LORA462"]
