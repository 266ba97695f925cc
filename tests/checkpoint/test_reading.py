"""What is read of a folder and of an archive, and what is left: at the bounds of each."""

from __future__ import annotations

import json
import warnings
import zipfile
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from pytest_lora.inspection.checkpoint import checkpoint_facts
from pytest_lora.inspection.checkpoint.folder import UnreadableError
from pytest_lora.inspection.checkpoint.pickled import Archive

P = "base_model.model."


def weights(path: Path, *names: str) -> None:
    """A safetensors file with a byte in each of these tensors."""
    header = {
        name: {"dtype": "U8", "shape": [1, 1], "data_offsets": [at, at + 1]} for at, name in enumerate(names)
    }
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(len(names)))


def written(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "highest"),
    [
        ({}, None),
        ({"added_tokens": {"a": 0}}, 0),
        ({"added_tokens": {"a": 7, "b": 3}}, 7),
        ({"added_tokens": {"a": 2**31 - 1, "b": 2**31}}, 2**31 - 1),
        ({"added_tokens": {"a": True, "b": -1, "c": "9", "d": 1.0}}, None),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": {}, "003": {}}}}, 7),
        ({"tokenizer_config": {"added_tokens_decoder": {"2147483647": {}, "2147483648": {}, "9" * 11: {}}}}, 2**31 - 1),
        ({"tokenizer_config": {"added_tokens_decoder": {"-1": {}, "\u0663": {}, "": {}, "9" * 5000: {}}}}, None),
        ({"tokenizer_config": {"added_tokens_decoder": [7], "a": 8}}, None),
        ({"added_tokens": {"a": 9}, "tokenizer_config": {"added_tokens_decoder": {"7": {}}}}, 9),
        ({"added_tokens": {"a": 5}, "tokenizer_config": {"added_tokens_decoder": {"7": {}}}}, 7),
        ({"added_tokens": [7]}, None),
    ],
)  # fmt: skip
def test_the_highest_token_that_was_added(tmp_path: Path, files: dict[str, Any], highest: int | None) -> None:
    assert checkpoint_facts(written(tmp_path, **files)).tokens == highest


@pytest.mark.parametrize(
    ("files", "config", "read"),
    [
        (["adapter_model", "adapters"], False, "adapter_model"),
        (["adapters"], False, "adapters"),
        (["adapters"], True, None),
        (["mine"], False, "mine"),
        (["mine"], True, None),
        (["mine", "other"], False, None),
        (["model"], False, None),
        (["adapter_model-00001-of-00002"], False, None),
        ([], False, None),
    ],
)
def test_which_weights_are_read(tmp_path: Path, files: list[str], config: bool, read: str | None) -> None:
    for name in files:
        weights(tmp_path / f"{name}.safetensors", "a.lora_A.weight")
    if config:
        written(tmp_path, adapter_config={"r": 1})
    assert checkpoint_facts(tmp_path).weights == (None if read is None else f"{read}.safetensors")


@pytest.mark.parametrize(
    ("names", "targets", "module"),
    [
        (["module.q"], ["q"], "q"),
        (["module.q", "v"], ["q"], "module.q"),
        (["module.q"], ["module.q"], "module.q"),
        (["module.q"], "module.q", "q"),
        (["module.q"], ["amodule.q", "q.module.", 3], "q"),
    ],
)
def test_a_part_that_is_called_as_a_wrapper(
    tmp_path: Path, names: list[str], targets: Any, module: str
) -> None:
    weights(tmp_path / "adapter_model.safetensors", *(f"{P}{name}.lora_A.weight" for name in names))
    facts = checkpoint_facts(written(tmp_path, adapter_config={"r": 1, "target_modules": targets}))
    assert facts.adapted[0].name == module


def test_factors_by_module(tmp_path: Path) -> None:
    weights(
        tmp_path / "adapter_model.safetensors",
        f"{P}q.lora_A.weight",
        f"{P}q.lora_B.weight",
        f"{P}q.lora_B.bias",
        f"{P}e.lora_embedding_A",
        f"{P}v.lora_magnitude_vector",
        f"{P}head.weight",
    )
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q"], "rank_pattern": {"e": 3}}
    facts = checkpoint_facts(written(tmp_path, adapter_config=config))
    assert [
        (m.name, m.a and m.a.name, m.b and m.b.name, m.magnitude and m.magnitude.name, m.configured_rank)
        for m in facts.adapted
    ] == [
        ("q", f"{P}q.lora_A.weight", f"{P}q.lora_B.weight", None, 1),
        ("e", f"{P}e.lora_embedding_A", None, None, 3),
        ("v", None, None, f"{P}v.lora_magnitude_vector", 1),
    ]


def test_folders_within_and_names_of_its_own(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        written(tmp_path / name, adapter_config={})
    (tmp_path / "empty").mkdir()
    assert len(checkpoint_facts(tmp_path).within) == 3
    assert checkpoint_facts(tmp_path / "empty").within == ()
    found = checkpoint_facts(tmp_path)
    assert (found.names_itself, found.unread, found.tensors) == (False, 0, ())
    for name, itself in (
        (str(tmp_path), True),
        (f"{tmp_path}/a/..", True),
        ("a/b", False),
        (str(tmp_path / "a"), False),
    ):
        facts = checkpoint_facts(written(tmp_path, adapter_config={"base_model_name_or_path": name}))
        assert (facts.names_itself, facts.within) == (itself, ())


# ------------------------------------------------------------------ the archive of torch.save


def archive(path: Path, size: int | None = None) -> Archive:
    return Archive(FileIO(str(path)), path.stat().st_size if size is None else size, path.name)


def packed(path: Path, *records: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in records:
            made.writestr(name, content)
    return path


def test_records_lie_where_they_are_said_to(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.bin", ("it/data.pkl", b"12345"), ("it/data/0", b"xyz"), ("other", b""))
    found = archive(path)
    record = found.record("data/0")
    assert path.read_bytes()[record.begin : record.begin + record.size] == b"xyz"
    assert found.read("data.pkl", 5) == b"12345"
    with pytest.raises(UnreadableError, match="is 5 bytes long; 4 are read"):
        found.read("data.pkl", 4)
    for name in ("other", "data/1"):
        with pytest.raises(UnreadableError, match="is missing"):
            found.record(name)
    end = record.begin + record.size
    assert archive(path, end).record("data/0") == record
    with pytest.raises(UnreadableError, match="lies beyond its end"):
        archive(path, end - 1).record("data/0")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x03\x04", 1)] = 0
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match="lies beyond its end"):
        archive(path).record("data/0")
    assert archive(path).read("data.pkl", 5) == b"12345"


def test_what_is_no_archive_of_torch_save(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    packed(path, ("it/data.pkl", b"1" * 99), how=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnreadableError, match="is packed, which"):
        archive(path).record("data.pkl")
    for records in (
        [("it/other", b"")],
        [("it/data.pkl", b""), ("it/a", b""), ("it/a", b"")],
        [("data.pkl", b"")],
    ):
        with pytest.raises(UnreadableError, match=r"it has no data\.pkl, or a record twice"):
            archive(packed(path, *records))
    path.write_bytes(b"no archive")
    with pytest.raises(UnreadableError, match="as PyTorch writes since"):
        archive(path)


@pytest.mark.parametrize(("count", "read"), [(63, True), (65, False)])
def test_four_mebibytes_of_a_list_of_records_are_read(tmp_path: Path, count: int, read: bool) -> None:
    names = [f"it/{number:02}{'n' * 65_000}" for number in range(count)]
    path = packed(tmp_path / "a.bin", ("it/data.pkl", b"1"), *((name, b"") for name in names))
    if read:
        assert archive(path).read("data.pkl", 1) == b"1"
    else:
        with pytest.raises(UnreadableError, match="takes more than 4,194,304 bytes"):
            archive(path)
