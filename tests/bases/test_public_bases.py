"""Public models by name: which names find which shape, that shapes are right, and what is said of a name unknown."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig

from pytest_lora import check_config, estimate_memory, rank_table
from pytest_lora.inspection import public_bases
from pytest_lora.inspection.public_bases import config_by_name, find_shape, is_name, shapes
from pytest_lora.inspection.skeleton import build_on_meta
from tests.forked import outcome

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B"),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"),
        ("NousResearch/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("unsloth/mistral-7b-bnb-4bit", "mistralai/Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "Qwen/Qwen3-30B-A3B"),
        ("unsloth/gemma-3-27b-it-unsloth-bnb-4bit", "google/gemma-3-27b-it"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("microsoft/Phi-3.5-mini-instruct", "microsoft/Phi-3-mini-4k-instruct"),
        ("roberta-base", "FacebookAI/roberta-base"),
        ("google/flan-t5-base", "google/flan-t5-base"),
        ("EleutherAI/pythia-1.4b-deduped", "EleutherAI/pythia-1.4b"),
        ("gpt2", "openai-community/gpt2"),
    ],
)
def test_copies_and_tuned_models_have_the_shape_of_their_model(name: str, model: str) -> None:
    found = find_shape(name)
    assert found is not None
    assert found.name == model


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-8B", "org/base", "llama", "meta-llama/Llama-3.2-11B-Vision", "mistral-7b-of-ours"]
)
def test_what_only_looks_alike_is_not_known(name: str) -> None:
    assert find_shape(name) is None


def test_every_public_name_finds_itself() -> None:
    assert {name for name in shapes() if find_shape(name) is not shapes()[name]} == set()


def test_the_data_is_small() -> None:
    assert (ROOT / "pytest_lora/bases/shapes.json").stat().st_size <= 150_000


QUICK = (
    "gpt2",
    "google/gemma-3-270m",
    "Qwen/Qwen2.5-0.5B",
    "t5-small",
    "bert-base-uncased",
    "openai/whisper-tiny",
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.lora_slow) for n in shapes())])
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    shape = find_shape(name)
    assert shape is not None
    try:
        config = config_by_name(name)
    except ValueError as error:
        pytest.skip(str(error))
    model = build_on_meta(config)
    found = sum(parameter.numel() for parameter in model.parameters())
    # From transformers 5 on, T5 shares a head with its embeddings that older checkpoints hold twice.
    head = config.vocab_size * config.d_model if shape.config["model_type"] == "t5" else 0
    assert found in (shape.parameters, shape.parameters - head)


def test_a_name_is_a_base_wherever_a_base_is_taken() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    assert not check_config(config, "Qwen/Qwen2.5-0.5B-Instruct").findings
    wrong = check_config(LoraConfig(r=8, target_modules=["c_attn"]), "Qwen/Qwen2.5-0.5B-Instruct")
    assert [f.code for f in wrong.errors] == ["LORA104"]
    rows = rank_table("meta-llama/Llama-2-7b-hf", [4, 8, 16], target_modules=["q_proj", "v_proj"])
    assert [(row.trainable, row.total) for row in rows.rows] == [
        (rank * 524_288, 6_738_415_616) for rank in (4, 8, 16)
    ]


def test_memory_of_a_name_is_that_of_its_configuration() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    named = estimate_memory(config=config, base="Qwen/Qwen2.5-0.5B", batch_size=1, seq_len=64)
    given = estimate_memory(config=config, base=config_by_name("Qwen/Qwen2.5-0.5B"), batch_size=1, seq_len=64)
    assert named.peak_allocated == given.peak_allocated > 494_032_768


def test_the_class_follows_a_task_type_that_brings_a_head() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    report = check_config(config, "Qwen/Qwen2.5-0.5B")
    assert "ForSequenceClassification" in report.subject


def test_an_unknown_name_says_what_to_do_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"did you mean Qwen/Qwen2.5-7B\?.*lora_bases = Qwen/Qwen2.5-8B = PATH"
    ) as error:
        config_by_name("Qwen/Qwen2.5-8B")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is no public model that is known;"):
        config_by_name("nobody/nothing-at-all")


def test_paths_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_name("org/model")
    assert not is_name("./org/model")
    assert not is_name("a/b/c")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert not is_name("gpt2")


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[str]:
    config_by_name("Qwen/Qwen2.5-0.5B").save_pretrained(tmp_path)
    public_bases.declared["org/ours"] = tmp_path
    yield "org/ours"
    del public_bases.declared["org/ours"]


def test_a_declared_base_is_read_from_its_path(ours: str) -> None:
    assert config_by_name(ours).hidden_size == 896


def test_a_model_in_the_local_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--org--cached/snapshots/0123456789abcdef"
    snapshot.mkdir(parents=True)
    config_by_name("gpt2").save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert config_by_name("org/cached").n_embd == 768


def test_a_shape_is_added_only_with_its_published_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "benchmarks/add_shape.py"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks/add_shape.py").read_text())
    data = tmp_path / "pytest_lora/bases/shapes.json"
    data.parent.mkdir(parents=True)
    data.write_text("{}")
    config_by_name("gpt2").save_pretrained(tmp_path)

    def add(parameters: str) -> subprocess.CompletedProcess[str]:
        sys.argv[1:] = ["org/gpt2", str(tmp_path / "config.json"), parameters]
        return outcome(lambda: runpy.run_path(str(script), run_name="__main__") and 0)

    monkeypatch.setattr(sys, "argv", [str(script)])
    refused = add("124439809")
    assert refused.returncode == 1
    assert "124,439,808 parameters, not 124,439,809" in refused.stderr
    assert json.loads(data.read_text()) == {}
    assert add("124439808").returncode == 0
    assert json.loads(data.read_text())["org/gpt2"]["config"]["n_embd"] == 768
