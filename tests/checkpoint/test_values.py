"""What the numbers of a saved tensor are like, beside torch; and which fields of a configuration may hold what."""

from __future__ import annotations

import math
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from pytest_lora.facts.saved_tensors import AdaptedModule, Key, TensorFacts, Values
from pytest_lora.inspection.checkpoint import values
from pytest_lora.inspection.checkpoint.config_file import config_file, lora_config
from pytest_lora.inspection.checkpoint.folder import UnreadableError
from pytest_lora.inspection.checkpoint.header import read_header
from pytest_lora.inspection.checkpoint.marks import Marking, Small, is_marked
from pytest_lora.inspection.checkpoint.values import read_values

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)


def read(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Values], int]:
    save_file(tensors, path)
    with FileIO(str(path)) as file:
        return read_values(file, read_header(file, path.stat().st_size, path.name), path.name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("chunk", [values.CHUNK, 64])
def test_numbers_are_those_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(values, "CHUNK", chunk)
    torch.manual_seed(0)
    odd = torch.randn(9, 8)
    odd[0, 0], odd[3, 3], odd[8, 7], odd[8, 6] = math.nan, -math.inf, math.inf, -0.0
    tensors = {
        "m.lora_B.weight": torch.randn(33, 8),
        "m.lora_A.weight": torch.randn(8, 33),
        "odd.lora_B.weight": odd,
        "zero.lora_B.weight": torch.tensor([[-0.0, 0.0]]),
        "large.lora_B.weight": torch.full((2, 2), torch.finfo(dtype).max, dtype=torch.float64),
        "none.lora_B.weight": torch.zeros(0, 4),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    found, left_out = read(tmp_path / "a.safetensors", tensors)
    assert left_out == 0
    for name, tensor in tensors.items():
        numbers = tensor.double()
        seen = found[name]
        assert seen.nans == int(numbers.isnan().sum())
        assert seen.infinities == int(numbers.isinf().sum())
        assert seen.zero == (not numbers.any())
        if dtype == torch.float8_e4m3fn:
            assert seen.rms is None
            continue
        wanted = numbers.square().mean().sqrt().item() if "lora_B" in name and tensor.numel() else None
        if wanted is None or not math.isfinite(wanted) or name.startswith("large"):
            assert seen.rms is None or not math.isfinite(seen.rms) or name.startswith("large")
        else:
            assert seen.rms == pytest.approx(wanted, rel=1e-3)


def test_parts_of_a_factor_that_hold_nothing(tmp_path: Path) -> None:
    b = torch.ones(6, 4)
    b[4:], b[:, 1] = 0, 0
    scattered = torch.ones(6, 4)
    scattered[2] = scattered[5] = 0
    first = torch.ones(6, 4)
    first[:2] = 0
    found, _ = read(
        tmp_path / "a.safetensors",
        {
            "m.lora_B.weight": b,
            "n.lora_B.weight": scattered,
            "o.lora_A.weight": first,
            "p.weight": first.clone(),
        },
    )
    marks = found["m.lora_B.weight"].marks
    assert marks is not None
    assert marks.rows == (True,) * 4 + (False,) * 2
    assert marks.columns == (True, False, True, True)
    assert marks.zero_rows == 2
    assert [found[name].marks.zero_rows for name in ("n.lora_B.weight", "o.lora_A.weight")] == [0, 2]
    assert found["p.weight"].marks is None


@pytest.mark.parametrize(
    ("name", "shape", "marked"),
    [
        ("m.lora_A.weight", (4, 8), True),
        ("m.lora_B", (4, 8), True),
        ("m.lora_embedding_A", (4, 8), False),
        ("m.lora_A.weight", (4, 8, 1), False),
        ("m.lora_A.weight", (4, 0), False),
        ("m.lora_A.weight", (4, 16), True),
        ("m.lora_A.weight", (4, 17), False),
    ],
)
def test_only_factors_whose_rows_fit_are_marked(name: str, shape: tuple[int, ...], marked: bool) -> None:
    assert is_marked(name, shape, 4, 64) is marked


@pytest.mark.parametrize(("size", "kept"), [(4096, True), (4097, False)])
def test_marks_are_of_as_many_places_as_there_are_ranks(size: int, kept: bool) -> None:
    for shape in ((size, 2), (2, size)):
        one = Marking(shape, 1, 1)
        one.add(np.ones((1, 2 * size), np.uint8))
        (found,) = one.marks()
        assert (found.rows == (True,) * shape[0]) is (kept or shape[0] == 2)
        assert (found.columns == (True,) * shape[1]) is (kept or shape[1] == 2)


def test_factors_are_read_before_the_bound_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a.weight": torch.ones(4), "z.lora_A.weight": torch.ones(4, 4), "whole": torch.ones(3).int()}
    for most, names, left in (
        (79, {"z.lora_A.weight"}, 16),
        (80, {"a.weight", "z.lora_A.weight"}, 0),
        (15, set(), 80),
    ):
        monkeypatch.setattr(values, "MAX_BYTES", most)
        found, left_out = read(tmp_path / "a.safetensors", tensors)
        assert (set(found), left_out) == (names, left)


def test_a_file_that_became_shorter_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(64)}, path)
    with FileIO(str(path)) as file:
        stored = read_header(file, path.stat().st_size, path.name)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UnreadableError, match="it became shorter"):
            read_values(file, stored, path.name)


# ------------------------------------------------------------------ adapter_config.json

MOST = 2**31
FIELDS: list[tuple[str, list[Any], list[Any]]] = [
    ("r", [1, 8, MOST - 1], [0, -1, 8.0, True, "8", MOST]),
    ("lora_alpha", [0, -1, 0.5, MOST - 1], [True, "16", MOST, -MOST]),
    ("lora_dropout", [0, 1, 0.5], [-0.1, 1.1, True, "0"]),
    ("target_modules", ["all-linear", ["q"], []], [["q", 1], 1, {}]),
    ("target_parameters", [["q"]], ["q", [1]]),
    ("modules_to_save", [["head"]], ["head", [None]]),
    ("bias", ["none", "all", "lora_only"], ["some", True]),
    ("use_rslora", [True, False, 0, 1], [2, "true", []]),
    ("init_lora_weights", [True, "pissa", 0], [2, []]),
    ("layers_to_transform", [0, [0, 1]], ["0", [0, "1"], True]),
    ("layers_pattern", ["layers", ["layers"]], [[1], 1]),
    ("rank_pattern", [{}, {"q": 1}], [{"q": 0}, {"q": 1.5}, {"q": "1"}, ["q"]]),
    ("alpha_pattern", [{}, {"q": 0.5}], [{"q": "1"}, ["q"]]),
    ("trainable_token_indices", [[1, 2], {"embed": [1]}], [1, {"embed": 1}, ["1"]]),
    ("task_type", ["CAUSAL_LM"], [1]),
    ("eva_config", [{}], [1, "x"]),
]


@pytest.mark.parametrize(("field", "good", "bad"), FIELDS, ids=[one[0] for one in FIELDS])
def test_what_a_field_may_hold(field: str, good: list[Any], bad: list[Any]) -> None:
    sound = {"peft_type": "LORA", "r": 8, "target_modules": ["q"]}
    for value in good:
        found = config_file({**sound, field: value}, None)
        assert (found.problem, found.settings is not None) == (None, True), value
    for value in bad:
        found = config_file({**sound, field: value}, None)
        assert found.problem is not None, value
        assert found.problem.startswith(f"{field} is "), value
        assert found.settings is None
    null = config_file({**sound, field: None}, None).problem
    raises = field in ("r", "lora_alpha", "lora_dropout", "bias", "rank_pattern", "alpha_pattern")
    assert (null is not None) is raises
    assert null is None or null.startswith(f"{field} is null, on which PEFT raises")


def test_silence_is_what_peft_takes() -> None:
    settings = config_file({}, None).settings
    assert settings is not None
    peft = LoraConfig()
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (
        peft.r,
        peft.lora_alpha,
        peft.use_rslora,
    )
    assert lora_config({"r": 4, "init_lora_weights": "pissa", "unknown": 1}).init_lora_weights is True
    assert lora_config({"init_lora_weights": False}).init_lora_weights is False


def test_other_methods_and_tools() -> None:
    assert (
        config_file({"peft_type": "lora"}, None).problem
        == "peft_type is 'lora', not 'LORA', as PEFT spells it"
    )
    assert config_file({"peft_type": "IA3", "r": "x"}, None).problem is None
    assert config_file({"peft_type": "IA3"}, None).settings is None
    mlx = config_file({"fine_tune_type": "lora", "use_bdlora": True}, None)
    assert (mlx.tool, mlx.settings, mlx.unjudged) == ("mlx-lm", None, ())
    assert config_file({"fine_tune_type": "lora", "peft_type": "LORA"}, None).tool is None
    assert config_file({"use_bdlora": True, "kasa_config": None}, None).unjudged == ("use_bdlora",)
    assert config_file({}, "it takes for ever").problem == "it takes for ever"
    code = config_file({"auto_map": {"a": "b"}, "megatron_core": "megatron.core"}, None).code
    assert code == ("auto_map",)
    both = config_file({"megatron_core": "m", "megatron_config": {"a": 1}}, None)
    assert both.code == ("megatron_core",)
    named = config_file({"r": 8, "bias": None, "task_type": None, "n" * 199: 1, "m" * 200: 1}, None)
    assert named.fields == ("r", "bias", "n" * 199)
    assert config_file({"base_model_name_or_path": " "}, None).base is None
    assert config_file({"base_model_name_or_path": " a/b "}, None).base == "a/b"
    mapping = {"base_model_class": "A", "parent_library": "b"}
    assert config_file({"auto_mapping": mapping}, None).base_class == "A"
    assert config_file({"auto_mapping": "x"}, None).library is None


# ------------------------------------------------------------------ modules of a file


def module(a: tuple[int, ...], b: tuple[int, ...], rank: int | None = 8) -> AdaptedModule:
    return AdaptedModule(
        "q",
        TensorFacts("q.lora_A.weight", "F32", a, None),
        TensorFacts("q.lora_B.weight", "F32", b, None),
        None,
        rank,
    )


@pytest.mark.parametrize(
    ("a", "b", "ranks", "agree", "turned"),
    [
        ((8, 64), (32, 8), (8, 8), True, ()),
        ((8, 64), (32, 4), (8, 4), False, ()),
        ((64, 8), (8, 32), (64, 32), False, ("lora_A", "lora_B")),
        ((64, 8), (32, 8), (64, 8), False, ("lora_A",)),
        ((8, 64), (8, 32), (8, 32), False, ("lora_B",)),
        ((8, 8), (8, 8), (8, 8), True, ()),
        ((8, 4, 3, 3), (32, 4, 1, 1), (8, 4), True, ()),
        ((8, 4, 3, 3), (32, 3, 1, 1), (8, 3), False, ()),
        ((0, 64), (32, 0), (None, None), True, ()),
        ((8,), (32, 8), (None, 8), False, ()),
    ],
)
def test_ranks_of_two_factors(
    a: Any, b: Any, ranks: tuple[int | None, int | None], agree: bool, turned: tuple[str, ...]
) -> None:
    found = module(a, b)
    assert ((found.rank, found.b_rank), found.ranks_agree, found.turned) == (ranks, agree, turned)


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("base_model.model.a.q.lora_A.weight", ("a.q", "lora_A", 1, (), "", False, "")),
        ("base_model.model.a.q.lora_A.default.weight", ("a.q", "lora_A", 1, (), "default", False, "")),
        ("base_model.model.base_model.model.a.q.lora_B.weight", ("a.q", "lora_B", 2, (), "", False, "")),
        ("a.q.lora_B.weight", ("a.q", "lora_B", 0, (), "", False, "")),
        ("module.base_model.model.a.q.lora_A.weight", ("a.q", "lora_A", 1, ("module",), "", False, "")),
        ("base_model.model._orig_mod.a.q.lora_A.weight", ("a.q", "lora_A", 1, ("_orig_mod",), "", False, "")),
        ("x.y.base_model.model.a.q.lora_A.weight", ("a.q", "lora_A", 0, (), "", False, "x.y")),
        ("base_model.model.a.q.lora_A", ("a.q", "lora_A", 1, (), "", True, "")),
        ("base_model.model.a.lora_embedding_A", ("a", "lora_embedding_A", 1, (), "", False, "")),
        ("base_model.model.score.weight", ("score", "", 1, (), "", False, "")),
    ],
)
def test_keys_are_taken_apart(key: str, parts: tuple[Any, ...]) -> None:
    found = Key.of(key)
    assert (
        found.module, found.part, found.prefixes, found.wrappers, found.adapter, found.is_cut, found.before
    ) == parts  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "infinite", "lowest_nan", "highest_nan"),
    [
        (torch.float16, 0x7C00, 0x7C01, 0x7FFF),
        (torch.bfloat16, 0x7F80, 0x7F81, 0x7FFF),
    ],
    ids=str,
)
def test_every_bit_of_a_fraction_makes_infinity_no_number(
    tmp_path: Path, dtype: torch.dtype, infinite: int, lowest_nan: int, highest_nan: int
) -> None:
    bits = torch.tensor([infinite, lowest_nan, highest_nan, 0], dtype=torch.int16)
    found, _ = read(tmp_path / "a.safetensors", {"x": bits.view(dtype)})
    assert (found["x"].nans, found["x"].infinities) == (2, 1)


def test_every_bit_of_a_double_makes_infinity_no_number(tmp_path: Path) -> None:
    infinite = 0x7FF0_0000_0000_0000
    bits = torch.tensor([infinite, infinite + 1, 0x7FFF_FFFF_FFFF_FFFF, 0])
    found, _ = read(tmp_path / "a.safetensors", {"x": bits.view(torch.float64)})
    assert (found["x"].nans, found["x"].infinities) == (2, 1)


@pytest.mark.parametrize(
    ("rank", "told"), [([1] * 20, f"{[1] * 20}"), ([1] * 19 + [11], f"{[1] * 19 + [11]}"[:60] + "...")]
)
def test_long_values_of_a_configuration_are_cut(rank: list[int], told: str) -> None:
    found = config_file({"peft_type": "LORA", "r": rank}, None)
    assert str(found.problem).startswith(f"r is {told}, not ")


@pytest.mark.parametrize(
    ("numbers", "zeros", "subnormals"),
    [
        ([0.0], 1.0, 0.0),
        ([1e-6], 0.0, 1.0),
        ([0.0, -1e-6], 0.5, 1.0),
        ([1e-6, 1.0, 2.0, 0.0], 0.25, 1 / 3),
        ([], 0, 0),
    ],
)
def test_shares_of_zeros_and_of_numbers_below_the_normal_ones(
    numbers: list[float], zeros: float, subnormals: float
) -> None:
    counts = Small(1)
    counts.add(np.array([numbers], np.float16).view(np.uint8))
    assert counts.shares(len(numbers)) == [(zeros, subnormals)]
