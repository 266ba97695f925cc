"""Pickled adapters: read as torch reads them, and never more of them than the file holds."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora import Expect, check_checkpoint
from pytest_lora.bases.examples import folders
from pytest_lora.inspection.checkpoint import pickled as reader
from pytest_lora.inspection.checkpoint.folder import Folder, UnreadableError
from pytest_lora.inspection.checkpoint.header import BITS
from pytest_lora.inspection.checkpoint.pickled import DTYPES, _Bounded, read_pickled
from tests.namespace import Namespace

NAME = "adapter_model.bin"
KINDS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    made = torch.zeros([*shape, 2])
    if draw(st.booleans()) and made.numel():
        made.view(-1)[draw(st.integers(0, made.numel() - 1))] = draw(
            st.sampled_from([float("nan"), 1.0, float("inf")])
        )
    made = made.to(draw(st.sampled_from(KINDS)))
    view = draw(st.sampled_from(["whole", "turned", "row", "column", "expanded", "parameter"]))
    if view == "turned":
        return made.transpose(0, -1)
    if view == "row" and made.shape[0] > 1:
        return made[1:]
    if view == "column":
        return made[..., 1]
    if view == "expanded":
        return made.unsqueeze(0).expand(3, *made.shape)
    return torch.nn.Parameter(made, requires_grad=False) if view == "parameter" else made


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=5), tensors(), max_size=4), st.booleans())
def test_what_is_read_is_what_torch_reads(state: dict[str, torch.Tensor], ordered: bool) -> None:
    file = _scratch() / NAME
    torch.save(OrderedDict(state) if ordered else state, file)
    loaded = torch.load(file, weights_only=True)
    found, _ = read_pickled(Folder(file.parent), NAME)
    assert [(t.name, t.shape) for t in found] == [(n, tuple(t.shape)) for n, t in loaded.items()]
    for tensor in found:
        theirs = loaded[tensor.name]
        assert BITS[tensor.dtype] == 8 * theirs.element_size()
        if tensor.values is not None:
            plain = theirs.float()
            assert tensor.values.nans == int(plain.isnan().sum())
            assert tensor.values.infinities == int(plain.isinf().sum())
            assert tensor.values.zero == (not plain.any())
        else:
            assert not theirs.is_floating_point() or not _is_whole(theirs)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether its numbers are all of a piece of its storage."""
    return tensor.numel() == 0 or tensor.permute(np.argsort(tensor.stride())[::-1].tolist()).is_contiguous()


_PLACES: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> None:
    _PLACES.append(tmp_path_factory.mktemp("pickled"))


def _scratch() -> Path:
    return _PLACES[-1]


def refused(content: bytes) -> str:
    (_scratch() / NAME).write_bytes(content)
    with pytest.raises(UnreadableError) as raised:
        read_pickled(Folder(_scratch()), NAME)
    return raised.value.fault.observed


def archive(data: bytes, packed: bool = False, **records: bytes) -> bytes:
    """An archive as torch.save writes it, with this pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as zipped:
        zipped.writestr("x/data.pkl", data)
        for key, content in records.items():
            zipped.writestr(f"x/data/{key}", content)
    return made.getvalue()


def saved(state: Any) -> bytes:
    made = io.BytesIO()
    torch.save(state, made)
    return made.getvalue()


def test_a_few_kilobytes_that_stand_for_gigabytes_take_none(tmp_path: Path) -> None:
    """A tensor of one number, expanded: made whole it has 8 GB."""
    names = Namespace(tmp_path)
    path = folders.pickle_weights(names.adapter())
    state = {
        name: torch.ones(1).expand(2**31) if "lora_B" in name else tensor
        for name, tensor in torch.load(path / NAME, weights_only=True).items()
    }
    torch.save(state, path / NAME)
    assert (path / NAME).stat().st_size < 50_000
    report = check_checkpoint(path, expect=Expect(read_pickle=True))
    assert not report.ok
    assert any("not looked at" in f.observed or "shape" in f.observed for f in report.findings), str(report)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("EXECUTED",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (archive(b"\0" * 10_000_000, packed=True), "is packed"),
        (archive(b"\0" * 9_000_000), "9,000,000 bytes long; 8,388,608 are read"),
        (archive(pickle.dumps(Evil(), 2)), "it asks for __builtin__.print"),
        (archive(pickle.dumps({"a": [1]}, 2)), "something else than named tensors"),
        (archive(pickle.dumps([1], 2)), "something else than named tensors"),
        (archive(b"]" + b"2" * 500_000), "it is "),
        (archive(b"\x80\x02r\xff\xff\xff\xff."), "it is "),
        (archive(b""), "it is no state dict"),
        (saved({"a": torch.zeros(4)}).replace(b"K\x04", b"K\x09"), "claims more numbers than the file has"),
        (saved({"a": torch.zeros(4)}).replace(b"FloatStorage", b"QuantStorage"), "unknown type QuantStorage"),
        (saved({"a": torch.zeros(4)})[:-40], "it is no archive of torch.save"),
        (pickle.dumps({}), "it is no archive of torch.save"),
        (b"", "it is no archive of torch.save"),
        (b"PK\x05\x06" + b"\xff" * 18, "it "),
    ],
    ids=range(14),
)
def test_what_is_no_state_dict_is_refused_in_words(
    content: bytes, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert why in refused(content)
    assert "EXECUTED" not in capfd.readouterr().out


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 60))
def test_damaged_files_are_read_or_refused(changes: list[tuple[float, int]], cut: int) -> None:
    content = bytearray(
        saved({"a.lora_A.weight": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)})
    )
    for place, byte in changes:
        content[int(place * (len(content) - 1))] = byte
    (_scratch() / NAME).write_bytes(bytes(content[: len(content) - cut if cut > 50 else None]))
    try:
        found, _ = read_pickled(Folder(_scratch()), NAME)
    except UnreadableError:
        return
    assert all(t.dtype in {*DTYPES.values()} for t in found)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "place"),
    [
        (0, [], [], (0, 4)),
        (2, [2, 3], [3, 1], (8, 24)),
        (0, [2, 3], [1, 2], (0, 24)),
        (1, [2, 3], [8, 2], (4, 52)),
        (1, [4, 1], [0, 9], (4, 4)),
        (5, [2, 0], [3, 1], (0, 0)),
    ],
)
def test_where_a_tensor_lies_in_its_storage(offset: int, shape: Any, strides: Any, place: Any) -> None:
    assert tuple(reader._place(offset, shape, strides, 4)) == place


def test_nothing_is_read_of_a_list_of_records_where_nothing_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(b"12345")
    with path.open("rb", buffering=0) as file:
        bounded = _Bounded(cast("Any", file), path.name)
        assert (bounded.read(0), bounded.read(2), bounded.tell()) == (b"", b"12", 2)


@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        ([2, 3], [3, 1], True),
        ([2, 3], [1, 2], True),
        ([2, 3], [4, 1], False),
        ([3], [2], False),
        ([3], [0], False),
        ([1, 3], [9, 1], True),
        ([0, 3], [7, 5], True),
        ([], [], True),
    ],
)
def test_whether_numbers_lie_side_by_side(shape: Any, strides: Any, dense: bool) -> None:
    assert reader._is_dense(shape, strides) is dense
