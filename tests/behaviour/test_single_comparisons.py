"""Which text of a batch has company, how two results are compared, and how far apart is too far: on a few numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_lora.inspection import behaviour
from pytest_lora.inspection.behaviour import copy_of, distance, identical, largest, main_tensor
from pytest_lora.inspection.behaviour.batch_law import (
    _alone,
    _apart,
    _caches,
    _evaluation,
    _in_company,
    _is_of_its_length,
    _relative,
    _tolerance,
    _without_cache,
    _without_targets,
)
from pytest_lora.inspection.behaviour.laws import _deviation_from_linear, _near
from pytest_lora.inspection.behaviour.merge import _allowed, _beyond, _is_quantized, _restored, _rounded_away
from pytest_lora.inspection.behaviour.texts import Text, _run, mask_of, pad_token, texts_of

N = -100
PLAIN: Any = SimpleNamespace(config=SimpleNamespace(pad_token_id=0))
WITHOUT_PAD: Any = SimpleNamespace(config=SimpleNamespace(pad_token_id=None))


def rows(*values: list[int]) -> Tensor:
    return torch.tensor(values)


def text_of(batch: dict[str, Any], root: Any = PLAIN) -> Text | None:
    (found,) = texts_of({0: batch}, root)
    return found


@pytest.mark.parametrize(
    ("base", "quantized"),
    [
        (nn.Linear(2, 2), False),
        (nn.Linear(2, 2).to(torch.bfloat16), False),
        (SimpleNamespace(weight=torch.zeros(2, dtype=torch.int8)), True),
        (SimpleNamespace(W_q=torch.zeros(2, dtype=torch.uint8)), True),
        (SimpleNamespace(), False),
    ],
)
def test_what_merging_rounds_once_more(base: Any, quantized: bool) -> None:
    assert _is_quantized(SimpleNamespace(get_base_layer=lambda: base)) == quantized


# ---------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("ids", "mask", "text"),
    [
        ([[5, 6, 7, 8], [5, 6, 7, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]], (1, 0, 3, 0)),
        ([[5, 6, 7, 9], [9, 5, 6, 7]], [[1, 1, 1, 0], [0, 1, 1, 1]], (0, 0, 3, 9)),
        ([[9, 8, 6, 7], [5, 6, 7, 9]], [[0, 0, 1, 1], [1, 1, 1, 0]], (0, 2, 4, None)),
        ([[5, 6, 7, 9]], [[1, 0, 1, 0]], None),
        ([[5, 6, 7, 9]], [[0, 0, 0, 0]], None),
        ([[5, 6, 7, 9], [5, 6, 7, 9]], [[0, 0, 0, 0], [1, 1, 1, 0]], (1, 0, 3, 9)),
        ([[5, 6, 7, 9]], [[1, 1, 1, 1]], None),
        ([[5, 6, 7, 9]], [[1, 1, 1]], None),
    ],
)
def test_a_mask_tells_the_shortest_text(
    ids: Any, mask: Any, text: tuple[int, int, int, int | None] | None
) -> None:
    found = text_of({"input_ids": rows(*ids), "attention_mask": rows(*mask)})
    if text is None:
        assert found is None
    else:
        assert found is not None
        assert (found.row, found.start, found.stop, found.filler) == text
        assert (found.batch, found.length, found.company) == (0, 4, "padding")


@pytest.mark.parametrize(
    ("ids", "labels", "root", "span"),
    [
        ([[5, 6, 7, 0, 0]], None, PLAIN, (0, 0, 3)),
        ([[5, 6, 7, 8, 0]], None, PLAIN, None),
        ([[0, 0, 7, 8, 9]], None, PLAIN, (0, 2, 5)),
        ([[5, 6, 7, 0, 0]], [[5, 6, 7, N, N]], PLAIN, (0, 0, 3)),
        ([[5, 6, 7, 0, 0]], [[5, 6, 7, 0, 0]], PLAIN, None),
        # Without a padding token: one token in runs of several lengths, the longest of three or more.
        ([[5, 6, 4, 4, 4], [5, 6, 7, 8, 4]], None, WITHOUT_PAD, (0, 0, 2)),
        ([[5, 6, 7, 4, 4], [5, 6, 7, 8, 4]], None, WITHOUT_PAD, None),
        ([[5, 6, 4, 4, 4], [5, 6, 4, 4, 4]], None, WITHOUT_PAD, None),
        ([[4, 4, 4, 6, 5], [4, 6, 7, 8, 5]], None, WITHOUT_PAD, (0, 3, 5)),
        # Of two that could be, the one that fills more.
        ([[3, 3, 3, 4, 4, 4, 4], [3, 6, 7, 8, 9, 9, 4]], None, WITHOUT_PAD, (0, 0, 3)),
        ([[3, 3, 3, 3, 4, 4, 4], [3, 6, 7, 8, 9, 9, 4]], None, WITHOUT_PAD, (0, 4, 7)),
    ],
)
def test_padding_that_no_mask_tells(
    ids: Any, labels: Any, root: Any, span: tuple[int, int, int] | None
) -> None:
    batch = {"input_ids": rows(*ids)} | ({} if labels is None else {"labels": rows(*labels)})
    found = text_of(batch, root)
    assert (found and (found.row, found.start, found.stop)) == span


@pytest.mark.parametrize(
    ("positions", "mask", "span"),
    [
        ([[0, 1, 2, 0, 1]], None, (0, 3, 5)),
        ([[0, 1, 0, 1, 2, 0]], None, (0, 2, 4)),  # as much as fits into the row once more
        ([[0, 1, 0, 1, 2, 3, 4, 5]], None, (0, 2, 5)),
        ([[0, 1, 2, 3, 0]], None, None),
        ([[0, 1, 0, 0, 0]], None, None),
        ([[0, 1, 2, 0, 2]], None, None),
        ([[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]], None, (1, 3, 5)),
        ([[0, 1, 2, 0, 1]], [[1, 1, 1, 1, 0]], None),
        ([[0, 1, 2, 0, 1]], [[0, 1, 1, 1, 1]], (0, 3, 5)),
    ],
)
def test_a_document_behind_another_one(positions: Any, mask: Any, span: tuple[int, int, int] | None) -> None:
    batch = {"input_ids": torch.ones_like(rows(*positions)), "position_ids": rows(*positions)}
    found = text_of(batch | ({} if mask is None else {"attention_mask": rows(*mask)}))
    assert (found and (found.row, found.start, found.stop, found.company)) == (span and (*span, "documents"))


def test_batches_of_other_forms_have_no_texts() -> None:
    ids = rows([5, 6, 7, 0, 0])
    known: list[Any] = [
        {"input_ids": ids[0]},
        {"input_ids": ids.to("meta")},
        {"input_ids": ids, "pixel_values": ids},
    ]
    assert list(texts_of(dict(enumerate([*known, [ids], {"input_ids": ids.tolist()}])), PLAIN)) == []
    decoded = {"input_ids": ids, "decoder_input_ids": ids}
    assert list(texts_of({0: decoded}, PLAIN)) == []
    both: Any = SimpleNamespace(config=SimpleNamespace(pad_token_id=0, is_encoder_decoder=True))
    assert len(list(texts_of({0: decoded}, both))) == 1
    counting = {"input_ids": ids, "position_ids": rows([0, 1, 2, 3, 4])}
    found = text_of(counting)
    assert found is not None
    assert found.company == "padding"
    # Rows of zeros are no documents.
    still = text_of({"input_ids": ids, "position_ids": rows([0, 0, 0, 0, 0])})
    assert still is not None
    assert still.company == "padding"
    assert _run(rows([4, 4, 5, 4]), 4).tolist() == [[True, True, False, False]]


def test_what_a_mask_says_of_a_text() -> None:
    text = Text(0, 1, 1, 3, 4, "padding", None)

    def said(mask: Any, inside: bool = False) -> Any:
        return mask_of({"attention_mask": mask}, text, inside=inside)

    assert (said(None), said(torch.ones(1, 1, 4, 4))) == ("none", "shows")
    assert said(rows([0, 0, 0, 0], [1, 1, 1, 1])) == "shows"
    assert said(rows([1, 1, 1, 1], [0, 1, 1, 1])) == "hides"
    assert said(rows([1, 1, 1, 1], [0, 1, 1, 1]), inside=True) == "shows"
    assert said(rows([1, 1, 1, 1], [1, 1, 0, 1]), inside=True) == "hides"
    assert pad_token(PLAIN) == 0
    assert pad_token(SimpleNamespace(config=SimpleNamespace(pad_token_id="0"))) is None


# ---------------------------------------------------------------------------------- inputs


class Root(nn.Module):
    def __init__(self, *, checkpointing: bool = False, **fields: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**fields)
        self.gradient_checkpointing = checkpointing

    def forward(self, input_ids: Any, **more: Any) -> None: ...


class Caching(Root):
    def forward(self, input_ids: Any, use_cache: Any = None) -> None: ...


class Strict(Root):
    def forward(self, input_ids: Any) -> None: ...


@pytest.mark.parametrize(
    ("root", "turned_off", "caches"),
    [
        (Caching(), True, False),
        (Caching(use_cache=True), True, True),
        (Caching(use_cache=True, checkpointing=True), True, False),
        (Caching(use_cache=False), True, False),
        (Root(use_cache=True), True, True),
        (Root(), False, False),
        (Strict(use_cache=True), False, False),
    ],
)
def test_the_cache_of_keys_and_values(root: Any, turned_off: bool, caches: bool) -> None:
    assert _without_cache(root) == ({"use_cache": False} if turned_off else {})
    assert _caches(root) is caches


def test_the_row_of_a_text_with_its_company_and_without() -> None:
    ids = rows([1, 2, 3, 4], [5, 6, 7, 8])
    batch = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": rows([1, 1, 1, 1], [0, 1, 1, 0]),
        "position_ids": ids,
        "token_type_ids": ids + 10,
        "num_items_in_batch": torch.tensor(3),
    }
    text = Text(0, 1, 1, 3, 4, "padding", None)
    beside = _in_company(batch, text, Strict())
    assert {name: value.tolist() for name, value in beside.items()} == {
        "input_ids": [[5, 6, 7, 8]],
        "attention_mask": [[0, 1, 1, 0]],
        "position_ids": [[5, 6, 7, 8]],
        "token_type_ids": [[15, 16, 17, 18]],
    }
    alone = _alone(batch, text, Strict())
    assert {name: value.tolist() for name, value in alone.items()} == {
        "input_ids": [[6, 7]],
        "token_type_ids": [[16, 17]],
        "attention_mask": [[1, 1]],
    }
    packed = text._replace(company="documents")
    assert _in_company(batch, packed, Strict())["input_ids"].tolist() == [[5, 6, 7]]
    square = {"input_ids": ids, "attention_mask": torch.ones(2, 1, 4, 4)}
    assert _in_company(square, packed, Strict())["attention_mask"].shape == (1, 1, 3, 3)
    assert _in_company(square, text, Strict())["attention_mask"].shape == (1, 1, 4, 4)
    assert "attention_mask" not in _alone(square, text, Strict())
    counted = _in_company({**batch, "max_length_q": 4}, packed, Strict())
    assert counted["input_ids"].shape == (2, 4)
    assert "max_length_q" not in _alone({"input_ids": ids, "max_length_q": ids}, text, Strict())


def test_labels_of_whole_rows_and_of_decoders_stay() -> None:
    ids = rows([1, 2])
    for root, labels, stays in (
        (Strict(), ids, False),
        (Strict(), torch.tensor([1]), True),
        (Strict(), [1], False),
        (Strict(is_encoder_decoder=True), ids, True),
    ):
        left = _without_targets({"input_ids": ids, "labels": labels, "num_items_in_batch": 3}, root)
        assert set(left) == {"input_ids", "labels"} if stays else {"input_ids"}


def test_modes_are_put_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with _evaluation(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


# ---------------------------------------------------------------------------------- results


def test_how_far_two_results_are_apart() -> None:
    one = torch.zeros(1, 3, 2)
    two = torch.full((1, 3, 2), 4.0)
    assert _relative(one, two) == 1.0
    # The median over the tokens of their largest difference.
    mixed = two.clone()
    mixed[0, 0, 0], mixed[0, 1, 1] = 9.0, 5.0
    assert _relative(mixed, two) == 0.25
    assert _relative(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])) == 0.5
    assert _relative(one, one) == 0.0
    assert _relative(torch.ones(1, 3, 2), one) == 0.0
    text = Text(0, 1, 1, 3, 4, "padding", None)
    row = torch.arange(8.0).reshape(2, 4, 1)
    assert _apart(row, torch.tensor([[[5.0], [6.0]]]), text) == 0.0
    assert _apart(row[1:], torch.tensor([[[5.0], [6.0]]]), text) == 0.0
    assert _apart(row[:1], torch.tensor([[[1.0], [2.0]]]), text) == 0.0
    assert _apart(row, torch.zeros(1, 3, 1), text) is None
    assert _apart(torch.tensor([[3.0]]), torch.tensor([[4.0]]), text) == 0.25


def test_what_rounding_may_do() -> None:
    result = torch.zeros(1)
    assert _tolerance(nn.Linear(1, 1), result) == 1e-4
    assert _tolerance(nn.Linear(1, 1).bfloat16(), result) == 3e-2
    assert _tolerance(nn.Linear(1, 1).double(), result.double()) == 1e-10
    with torch.autocast("cpu", dtype=torch.float16):
        assert _tolerance(nn.Linear(1, 1), result) == 4e-3
    packed = nn.Linear(1, 1)
    packed.register_parameter("codes", nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False))
    assert _tolerance(packed, result) == 3e-2
    packed.register_parameter(
        "codes", nn.Parameter(torch.zeros(1).to(torch.float8_e4m3fn), requires_grad=False)
    )
    assert _tolerance(packed, result) is None


@pytest.mark.parametrize(
    ("fields", "length", "own"),
    [
        ({}, 9, False),
        ({"expert_capacity": 3}, 9, True),
        ({"attention_type": "block_sparse"}, 9, True),
        ({"attention_type": "original_full"}, 9, False),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 8}, 9, True),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 9}, 9, False),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 8}, 9, True),
        (
            {
                "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 8},
                "max_position_embeddings": 99,
            },
            9,
            True,
        ),
        ({"rope_scaling": {"type": "linear"}, "max_position_embeddings": 8}, 9, False),
        ({"rope_scaling": {"type": "dynamic"}}, 1, True),
        ({"rope_scaling": "dynamic"}, 9, False),
    ],
)
def test_models_that_read_a_text_otherwise_in_a_longer_row(
    fields: dict[str, Any], length: int, own: bool
) -> None:
    assert _is_of_its_length(Strict(**fields), length) is own


# ---------------------------------------------------------------------------------- comparisons


def test_tensors_that_are_the_same() -> None:
    nan, inf = math.nan, math.inf
    one = torch.tensor([1.0, nan, inf])
    assert identical(one, one.clone())
    assert not identical(one, torch.tensor([1.0, 2.0, inf]))
    assert not identical(one, torch.tensor([2.0, nan, inf]))
    assert not identical(torch.tensor([nan]), torch.tensor([[nan]]))
    assert not identical(torch.tensor([nan]), torch.tensor([nan, nan]))
    assert distance(one, torch.tensor([1.5, nan, inf])) == 0.5
    assert distance(one, one[:2]) == inf
    assert distance(torch.zeros(0), torch.zeros(0)) == 0.0
    assert math.isnan(distance(one, torch.tensor([1.0, 2.0, inf])))
    assert (largest(torch.tensor([-3.0, 2.0, inf, nan])), largest(torch.tensor([nan]))) == (3.0, 0.0)
    assert largest(torch.tensor([1, -7])) == 7.0
    assert largest(torch.tensor([2.0]).to(torch.float8_e4m3fn)) == 2.0
    assert largest(torch.tensor([3.0, inf], dtype=torch.float16)) == 3.0


def test_large_tensors_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    assert behaviour.PIECE == 16_777_216
    monkeypatch.setattr(behaviour, "PIECE", 2)
    one = torch.arange(5.0)
    assert [piece.tolist() for piece in behaviour._pieces(one)] == [[0.0, 1.0], [2.0, 3.0], [4.0]]
    for place in range(5):
        other = one.clone()
        other[place] += place + 1
        assert distance(one, other) == place + 1


def test_the_tensor_that_is_compared() -> None:
    first, second, loss = torch.ones(1), torch.ones(2), torch.tensor(0.5)
    assert main_tensor(first) is first
    assert main_tensor({"loss": loss, "other": second, "logits": first}) is first
    assert main_tensor({"loss": loss, "other": second, "last_hidden_state": first}) is first
    assert main_tensor((loss, second, first)) is second
    with pytest.raises(ValueError, match="gives no tensor"):
        main_tensor({"loss": loss, "text": "a"})


def layer(dtype: torch.dtype) -> Any:
    base = nn.Linear(1, 1).to(dtype)
    return SimpleNamespace(get_base_layer=lambda: base)


def test_what_a_merge_may_change() -> None:
    expected = torch.tensor([-4.0, 2.0])
    layers = {"a": layer(torch.float32)}
    assert _allowed(layers, expected, (None, None)) == (1e-4, pytest.approx(4e-4))
    assert _allowed(layers, expected, (0.5, None)) == (0.5, 2.0)
    assert _allowed(layers, expected, (0.0, 0.25)) == (0.0, 0.25)
    assert _allowed(layers, expected, (0.5, 0.25)) == (0.5, 2.25)
    assert _allowed(layers, expected.bfloat16(), (None, None))[0] == 3e-2
    assert _allowed({"a": layer(torch.float16)}, expected, (None, 1.0)) == (4e-3, pytest.approx(1.016))
    assert _allowed({"a": layer(torch.float8_e4m3fn)}, expected, (None, None))[0] == 1e-4


def test_what_taking_an_adapter_off_again_may_round() -> None:
    eps = torch.finfo(torch.float32).eps
    before = torch.tensor([1.0, 0.5])

    def apart(steps: float, merged: float = 0.0) -> bool:
        return _restored(before, before + torch.tensor([0.0, steps * eps]), merged)

    assert apart(0)
    assert apart(4)
    assert not apart(5)
    assert apart(5, merged=2.0)
    assert apart(8, merged=2.0)
    assert not apart(9, merged=2.0)


def test_what_no_matrix_of_a_rank_can_hold() -> None:
    update = torch.diag(torch.tensor([5.0, 4.0, 3.0]))
    assert _beyond(update, 1) == pytest.approx(5.0)
    assert _beyond(update, 2) == pytest.approx(3.0)
    assert _beyond(update, 3) == 0.0


class Scaled:
    """A layer whose effect is its scaling times a half, and a little of the scaling's square."""

    def __init__(self, curved: float) -> None:
        self.scaling, self.on, self.curved = {"default": 2.0}, True, curved

    def enable_adapters(self, on: bool) -> None:
        self.on = on

    def output(self) -> Tensor:
        scaling = self.scaling["default"]
        return torch.tensor([3.0 + (0.5 * scaling + self.curved * scaling**2 if self.on else 0.0)])


def test_doubling_the_scaling_doubles_the_effect() -> None:
    def off(curved: float) -> float | None:
        layer = Scaled(curved)
        found = _deviation_from_linear(SimpleNamespace(name="a", layer=layer, output=layer.output))
        assert (layer.scaling, layer.on) == ({"default": 2.0}, True)
        return found

    # Of 5, two thousandths of a percent: 8 times the curve is what doubling adds beside.
    assert off(0.0) is None
    assert off(0.9e-3 / 8) is None
    assert off(1.1e-3 / 8) == pytest.approx(1.1e-3, rel=1e-2)


def test_what_is_near() -> None:
    second = torch.tensor([2.0, 8.0])
    assert _near(second.clone(), second)
    assert _near(second + torch.tensor([7.9e-4, 0.0]), second)
    assert not _near(second + torch.tensor([8.2e-4, 0.0]), second)
    assert _near(second + torch.tensor([15e-4, 0.0]), second, steps=2.0)
    assert not _near(torch.tensor([1]), torch.tensor([2]))


class Merged:
    """A layer whose adapters are in its weight: what the weight is now, and the update that is meant."""

    lora_variant: dict[str, Any] = {}  # noqa: RUF012
    merged_adapters = ("default",)

    def __init__(self, weight: Tensor, update: Tensor) -> None:
        self.base, self.update, self.use_dora = SimpleNamespace(weight=weight), update, {"default": False}

    def get_base_layer(self) -> Any:
        return self.base

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.update


def test_the_share_of_an_update_that_a_merge_rounds_away() -> None:
    old, update = torch.ones(2, 3).bfloat16(), torch.tensor([[0.0, 1e-4, 1e-4], [0.0, 1e-4, 0.5]])
    layer = Merged((old.float() + update).bfloat16(), update)
    assert _rounded_away({"q": layer}, {"q.base_layer.weight": old}) == (0.75, ("bfloat16",))
    two = {"q": layer, "k": Merged(old + 1, torch.ones(2, 3))}
    before = {f"{name}.base_layer.weight": old for name in two}
    assert _rounded_away(two, before) == (3 / 10, ("bfloat16",))
    still = Merged(old, torch.zeros(2, 3))
    assert _rounded_away({"q": still}, before) == (None, ("bfloat16",))
    assert _rounded_away({"v": layer}, before) == (None, ())
    layer.use_dora["default"] = True
    assert _rounded_away({"q": layer}, before) == (None, ())
    for weight, change in ((old.flatten(), update.flatten()), (old.to(torch.uint8), update), (old, update.T)):
        other = Merged(weight, change)
        assert _rounded_away({"q": other}, {"q.base_layer.weight": weight.clone()}) == (None, ())


def test_tensors_that_modules_remember_are_no_obstacle_to_a_copy_wherever_they_are_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    result = model(torch.ones(1, 2))
    for name, kept in (
        ("one", result),
        ("several", [3, (result, {"deep": result})]),
        ("other", {"text": "a"}),
    ):
        setattr(model[0], name, kept)
    made: Any = copy_of("model", model)
    assert torch.equal(made[0].one, result)
    assert made[0].several[1][1]["deep"].grad_fn is None
    assert result.grad_fn is not None
    assert not made.training
    assert model.training
    with pytest.raises(ValueError, match="model is on the meta device and has no values"):
        copy_of("model", nn.Linear(1, 1, device="meta"))


def test_a_model_with_two_texts_has_one_configuration() -> None:
    """transformers refuses to choose between the parts of MusicGen."""

    def refuse() -> None:
        raise ValueError("Multiple valid text configs were found")

    config = SimpleNamespace(get_text_config=refuse, pad_token_id=7)
    root: Any = SimpleNamespace(config=config)
    assert pad_token(root) == 7
