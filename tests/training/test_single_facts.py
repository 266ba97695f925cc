"""Facts on batches, losses, updates and weights, each from a few numbers."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pytest_lora.facts.batches import AloneFacts, TextBounds
from pytest_lora.facts.model_parts import Wrappers
from pytest_lora.facts.steps import ShiftFacts
from pytest_lora.inspection.survey import survey
from pytest_lora.inspection.training.batches import (
    LOOKED_AT,
    first_rows,
    generators_of,
    loss_of,
    require_batches,
    take_batches,
)
from pytest_lora.inspection.training.beside import Padding, Shift, _mean
from pytest_lora.inspection.training.circumstances import (
    Passed,
    Ran,
    blank_inputs,
    live_dropouts,
    odd_masks,
    repacked_layers,
    row_count,
    spoiled_inputs,
)
from pytest_lora.inspection.training.failures import failure_of
from pytest_lora.inspection.training.labels import _outside
from pytest_lora.inspection.training.media import grids_disagree, medium_facts, placeholders_of
from pytest_lora.inspection.training.optimizer import _floor
from pytest_lora.inspection.training.rows import _used, empty_rows
from pytest_lora.inspection.training.special_tokens import _crossing, text_bounds
from pytest_lora.inspection.training.updates import (
    NOISE,
    SPARE,
    WHOLE,
    Updates,
    _changed,
    _distance,
    _Held,
    _rank,
    _Update,
)
from pytest_lora.inspection.training.watch import Watch, norms
from tests.test_labels import words

N = -100
ZERO, ONE = torch.zeros(2, 3), torch.eye(2, 3)


def rows(*values: list[int]) -> Tensor:
    return torch.tensor(values)


# ---------------------------------------------------------------------------------- texts


def bounds(kind: Any, labels: Tensor, ids: Tensor | None = None, **batch: Any) -> TextBounds:
    return text_bounds(kind, labels, ids, batch, words(stops=(2, 3), decoder_start=0))


@pytest.mark.parametrize(
    ("labels", "ids", "filler", "filled"),
    [
        (rows([1, 2, 7, 7]), rows([1, 2, 3, 4]), 7, 0.5),
        (rows([1, 9, 7, 7]), rows([1, 2, 3, 4]), 7, 0.5),
        (rows([1, N, 7, N]), rows([1, 2, 3, 4]), 7, 0.5),
        (rows([1, 2, 3, N]), rows([1, 2, 3, 4]), None, 0.0),
        (rows([1, 2, 3, N]), None, None, 0.0),
    ],
)
def test_what_stands_in_the_place_of_labels(
    labels: Tensor, ids: Tensor | None, filler: int | None, filled: float
) -> None:
    found = bounds("causal", labels, ids)
    assert (found.filler, found.filled) == (filler, filled)
    other = bounds("tokens", labels, ids)
    assert (other.filler, other.filled, other.crossing, other.closed, other.prompted) == (None, 0.0, 0, 0, 0)
    assert (other.finished, other.last_tokens, other.crossing_tokens) == (0, 0, 0)


def test_rows_that_begin_with_the_token_that_the_model_puts_there() -> None:
    labels = rows([0, 5], [0, 0], [0, N], [5, 0])
    assert bounds("sequence", labels).started == 1
    assert bounds("causal", labels).started == 0
    assert text_bounds("sequence", labels, None, {}, words(stops=())).started == 0
    assert bounds("sequence", rows([0], [0])).started == 0
    assert bounds("sequence", torch.tensor([0, 5])).started == 0


def test_labels_at_the_first_token_of_a_further_document() -> None:
    positions = rows([0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 0])
    labels = rows([5, 6, 7, 8, 7, 9], [5, 6, 7, 8, 9, 9], [5, 6, 7, 8, 9, 9])
    found = bounds("causal", labels, position_ids=positions)
    assert (found.crossing, found.crossing_tokens) == (2, 1)
    labels[0, 4] = 4
    assert bounds("causal", labels, position_ids=positions).crossing_tokens == 2
    labels[0, 2] = N
    assert bounds("causal", labels, position_ids=positions).crossing == 1
    assert bounds("causal", labels, position_ids=positions[:1]).crossing == 0
    assert bounds("causal", labels).crossing == 0


def closed(labels: Tensor, ids: Tensor | None, mask: Any, **more: Any) -> tuple[int, int, int]:
    found = bounds("causal", labels, ids, attention_mask=mask, **more)
    return found.finished, found.closed, found.last_tokens


def test_texts_that_end_before_their_row() -> None:
    ids = rows([5, 6, 2, 0], [5, 6, 7, 0], [5, 6, 7, 2], [5, 2, 9, 0], [5, 6, 7, 3])
    mask = rows([1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0])
    # The last of them hides an end token that also pads.
    assert closed(ids, ids, mask) == (4, 4, 3)
    labels = ids.clone()
    labels[0, 2] = N
    assert closed(labels, ids, mask) == (3, 3, 3)
    assert closed(ids, ids, torch.zeros_like(mask)) == (0, 0, 0)
    assert closed(ids, ids, mask, position_ids=mask) == (0, 0, 0)
    assert closed(ids, None, mask) == (0, 0, 0)
    assert closed(ids, ids, None) == (0, 0, 0)
    assert closed(ids, ids, mask[:1]) == (0, 0, 0)
    three_back = rows([5, 2, 9, 9, 0])
    assert closed(three_back, three_back, rows([1, 1, 1, 1, 0])) == (1, 0, 1)
    whole = text_bounds("causal", ids, ids, {"attention_mask": mask}, words(stops=(), decoder_start=0))
    assert (whole.finished, whole.closed, whole.last_tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("labels", "mask", "prompted"),
    [
        (rows([N, N, 5, 6]), None, 1),
        (rows([N, 5, 6, 7]), None, 0),
        (rows([N, N, N, 6], [5, 6, 7, 8], [N, N, N, N]), None, 1),
        (rows([N, N, N, 6]), rows([0, 1, 1, 1]), 1),
        (rows([N, N, N, 6]), rows([0, 0, 1, 1]), 0),
        (rows([N, N, N, 6]), rows([0, 0, 1, 1], [0, 0, 1, 1]), 1),
    ],
)
def test_rows_whose_first_tokens_have_no_label(labels: Tensor, mask: Tensor | None, prompted: int) -> None:
    assert bounds("causal", labels, labels, attention_mask=mask).prompted == prompted


@pytest.mark.parametrize(
    ("ids", "first", "mask", "header"),
    [
        (rows([5, 6, 7, 8, 5, 6, 7]), 3, None, 1),
        (rows([5, 6, 7, 8, 5, 6, 9]), 3, None, 0),
        (rows([5, 5, 5, 8, 5, 5, 5]), 3, None, 0),
        (rows([6, 7, 8, 9, 8, 6, 7]), 2, None, 0),
        (rows([1, 5, 6, 7, 5, 6, 7]), 4, None, 1),
        (rows([5, 6, 7, 5, 6, 7, 0]), 3, rows([1, 1, 1, 1, 1, 1, 0]), 1),
        (rows([5, 6, 7, 5, 6, 7, 0]), 3, rows([1, 1, 1, 1, 1, 1, 1]), 0),
        (rows([5, 6, 7, 8, 5, 6, 7]), 7, None, 0),
    ],
    ids=[
        "ends",
        "ends otherwise",
        "one token",
        "too short",
        "further in",
        "padded",
        "zero is text",
        "no label",
    ],
)
def test_rows_that_end_with_the_header_of_an_answer(ids: Tensor, first: int, mask: Any, header: int) -> None:
    labels = ids.clone()
    labels[:, :first] = N
    assert bounds("causal", labels, ids, attention_mask=mask).header == header


@pytest.mark.parametrize(
    ("hidden", "pad", "stops", "plain"),
    [
        ([0, 0], 0, (), True),
        ([0, 0], 0, (2,), True),
        ([2, 2], 0, (2,), True),
        ([5, 5], 0, (2,), False),
        ([0, 2], 0, (2,), False),
        ([5, 5], None, (2,), True),
        ([], 0, (2,), False),
    ],
)
def test_what_a_mask_hides_is_padding_if_it_is_one_token_that_pads(
    hidden: list[int], pad: int | None, stops: tuple[int, ...], plain: bool
) -> None:
    own: Any = SimpleNamespace(_words=words(pad=pad, stops=stops))
    assert Padding._is_plain(own, torch.tensor(hidden)) is plain


@pytest.mark.parametrize(
    ("batch", "furthest"),
    [
        ({}, 4),
        ({"attention_mask": rows([1, 1, 0, 0], [0, 1, 1, 1])}, 3),
        ({"attention_mask": rows([1, 1, 1])}, 0),
        ({"position_ids": rows([0, 1, 0, 1], [0, 1, 2, 0])}, 3),
        ({"position_ids": rows([0, 1, 2, 3])}, 0),
        ({"pixel_values": rows([1])}, 0),
    ],
    ids=["whole rows", "padded", "another mask", "packed", "other positions", "not only texts"],
)
def test_how_many_positions_the_longest_text_takes(batch: dict[str, Tensor], furthest: int) -> None:
    ids = rows([5, 6, 7, 8], [5, 6, 7, 8])
    assert bounds("causal", ids, ids, **batch).furthest == furthest
    assert bounds("sequence", ids, ids, **batch).furthest == 0


# ---------------------------------------------------------------------------------- media


def multimodal(**fields: Any) -> Any:
    class Root(nn.Module):
        config = SimpleNamespace(**fields)

        def forward(self, input_ids: Any, mm_token_type_ids: Any = None) -> None: ...

    return Root()


def test_placeholder_tokens() -> None:
    root = multimodal(image_token_id=7, image_token_index=8, video_token_id=7, audio_token_id=True)
    assert [tuple(one) for one in placeholders_of(root)] == [
        ("image", 7, "image_token_id"),
        ("image", 8, "image_token_index"),
    ]
    assert placeholders_of(multimodal(image_token_id=-1, video_token_id=None)) == ()
    assert len(placeholders_of(multimodal(image_token_id=0))) == 1


IDS = rows([7, 7, 5, 7], [5, 5, 5, 5])


def test_media_of_a_batch() -> None:
    root = multimodal(image_token_id=7, vision_config=SimpleNamespace(spatial_merge_size=2))
    batch = {
        "input_ids": IDS,
        "labels": rows([7, 7, N, 5], [5, 5, N, 7]),
        "image_grid_thw": rows([1, 4, 2], [1, 2, 2]),
        "pixel_values": torch.ones(12, 3),
        "mm_token_type_ids": rows([1, 0, 0, 0], [0, 0, 0, 0]),
        "pixel_attention_mask": torch.ones(1),
        "image_sizes": torch.ones(1),
        "pixel_values_videos": torch.ones(0),
        "image_extra": None,
    }
    (found,) = medium_facts((batch,), root)
    assert (found.batch, found.placeholders, found.rows) == (0, 3, 1)
    assert found.inputs == ("pixel_values",)
    assert (found.wanted, found.targets, found.of_targets) == (3, 2, 4)
    assert (found.types, found.untyped) == ("mm_token_type_ids", 2)
    assert not grids_disagree(batch, root)
    for name, value in (
        ("pixel_values", torch.ones(11, 3)),
        ("image_grid_thw", rows([1, 4, 2])),
        ("input_ids", rows([7, 7, 7, 7])),
    ):
        assert grids_disagree({**batch, name: value}, root)
    assert not grids_disagree({**batch, "pixel_values": torch.ones(11, 3, 2)}, root)
    (other,) = medium_facts(({**batch, "labels": rows([7, 7])},), root)
    assert (other.targets, other.of_targets) == (0, 0)
    (untyped,) = medium_facts(({**batch, "mm_token_type_ids": rows([1])},), root)
    assert untyped.untyped is None
    (video,) = medium_facts(({**batch, "pixel_values_videos": torch.ones(1)},), root)
    assert video.inputs == ("pixel_values", "pixel_values_videos")
    second = multimodal(image_token_id=7, video_token_id=8)
    image, _ = medium_facts(({**batch, "pixel_values_videos": torch.ones(1)},), second)
    assert (image.inputs, image.wanted) == (("pixel_values",), None)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "inputs_embeds": IDS},
        {"input_ids": IDS[0]},
        {"input_ids": IDS.to("meta")},
        {"input_ids": IDS.tolist()},
        {},
        [IDS],
    ],
)
def test_batches_that_hold_no_tokens_say_nothing_of_media(batch: Any) -> None:
    assert list(medium_facts((batch,), multimodal(image_token_id=7))) == []
    assert list(medium_facts(({"input_ids": IDS},), multimodal())) == []


@pytest.mark.parametrize("grid", [None, rows([1, 4])[0], rows([1, 4, 2]).to("meta")])
def test_a_grid_that_cannot_be_read_asks_for_nothing(grid: Any) -> None:
    root = multimodal(image_token_id=7, vision_config=SimpleNamespace(spatial_merge_size=2))
    (found,) = medium_facts(({"input_ids": IDS, "image_grid_thw": grid},), root)
    assert found.wanted is None
    assert found.untyped is None


# ---------------------------------------------------------------------------------- tokens


def test_tokens_that_are_read_and_aimed_at() -> None:
    batch = {
        "input_ids": rows([4, 5, 6]),
        "labels": rows([N, 8, 9]),
        "attention_mask": rows([1, 1, 0]),
    }
    assert _used((batch,), None) == ({4, 5}, {8, 9})
    assert _used((batch,), 5) == ({4}, {8, 9})
    assert _used(({**batch, "attention_mask": rows([1, 1])},), None)[0] == {4, 5, 6}
    assert _used(({**batch, "labels": torch.tensor([8])},), None)[1] == set()
    assert _used(({**batch, "labels": torch.tensor([[8.0]])},), None)[1] == set()
    for ids in (rows([4])[0], rows([4]).to("meta"), [4], None):
        assert _used(({**batch, "input_ids": ids},), None) == (set(), set())
    assert _used(([4],), None) == (set(), set())


def test_rows_of_zeros() -> None:
    embedding, head = nn.Embedding(6, 2, padding_idx=1), nn.Linear(2, 6, bias=False)
    with torch.no_grad():
        embedding.weight.fill_(1.0)
        embedding.weight[[0, 1, 3, 5]] = 0.0
        head.weight.zero_()
    base: Any = SimpleNamespace(input_embeddings="embed", output_embeddings="head")
    modules: dict[str, nn.Module] = {"embed": embedding, "head": head}
    ids = rows([0, 1, 2, 3, 6, -1])
    batch = {"input_ids": ids, "labels": ids}
    (found,) = empty_rows((batch,), modules, base, None)
    assert (found.module, found.tokens) == ("embed", (0, 3))
    (padded,) = empty_rows((batch,), modules, base, 3)
    assert padded.tokens == (0,)
    assert list(empty_rows(({"input_ids": rows([0, 3, 5])},), modules, base, None)) == []
    assert list(empty_rows(({"input_ids": rows([2, 4])},), modules, base, None)) == []
    nowhere: Any = SimpleNamespace(input_embeddings=None, output_embeddings="away")
    assert list(empty_rows((batch,), modules, nowhere, None)) == []


# ---------------------------------------------------------------------------------- losses


def test_the_mean_loss_of_what_counts() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, 1, 2] = math.log(3.0)
    labels = rows([N, 2, 0], [N, N, N])
    mean = _mean(logits, labels)
    assert mean == pytest.approx((math.log(2.0) + math.log(4.0)) / 2)
    assert _mean(logits, torch.full((2, 3), N)) is None


def labelled(**changes: Any) -> Any:
    return (SimpleNamespace(**{"batch": 0, "kind": "causal", "same": 0.95, "ahead": 0.0, **changes}),)


class Spoken(nn.Module):
    def forward(self, logits: Tensor, as_dict: bool = False) -> Any:
        return {"logits": logits} if as_dict else SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("known", "calls", "shape", "seen"),
    [
        (labelled(), 1, (1, 3, 4), True),
        (labelled(same=0.0, ahead=0.95), 1, (1, 3, 4), True),
        (labelled(same=0.94, ahead=0.94), 1, (1, 3, 4), False),
        (labelled(kind="tokens"), 1, (1, 3, 4), False),
        (labelled(batch=1), 1, (1, 3, 4), False),
        (labelled(), 2, (1, 3, 4), False),
        (labelled(), 0, (1, 3, 4), False),
        (labelled(), 1, (1, 2, 4), False),
        (labelled(), 1, (3, 4), False),
    ],
)
def test_when_a_loss_is_compared_with_its_logits(
    known: Any, calls: int, shape: tuple[int, ...], seen: bool
) -> None:
    root = Spoken()
    for as_dict in (False, True):
        shift = Shift(root)
        for _ in range(calls):
            root(torch.zeros(shape), as_dict)
        found = shift.compared(torch.tensor(5.0), {"labels": rows([1, 2, 3])}, known, 0)
        assert (found is not None) is seen
        if found is not None:
            assert (found.loss, found.in_place) == (5.0, pytest.approx(math.log(4.0)))
            assert found.ahead == pytest.approx(math.log(4.0))
    assert not root._forward_hooks


def test_rows_of_one_token_and_other_batches_have_no_shift() -> None:
    root = Spoken()
    for labels, batch in ((rows([1]), None), (rows([1, 2]), "labels"), (rows([N, N]), None)):
        shift = Shift(root)
        root(torch.zeros(1, labels.shape[1], 4))
        given: Any = {"labels": labels} if batch is None else [labels]
        assert shift.compared(torch.tensor(5.0), given, labelled(), 0) is None
    shift = Shift(root)
    root(torch.zeros(1, 2, 4))
    two = shift.compared(torch.tensor(5.0), {"labels": rows([1, 2])}, labelled(), 0)
    assert two is not None


# ---------------------------------------------------------------------------------- updates


def test_the_rank_that_an_update_may_have() -> None:
    assert (_Update(3, True, False).allowed, _Update(3, False, False).allowed) == (3, 6)
    assert (WHOLE, SPARE, NOISE) == (512, 8, 8.0)


@pytest.mark.parametrize("written", [False, True])
def test_a_base_weight_of_which_no_copy_was_made_has_moved_if_it_was_written_to(written: bool) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    weight = model.get_parameter("base_model.model.0.base_layer.weight")
    with torch.no_grad():
        weight.mul_(2.0)  # as loading does
        updates = Updates(survey(model), cast("Any", SimpleNamespace(before=lambda tensor: None)))
        if written:
            weight.mul_(2.0)
    (found,) = updates.facts(ranks=False)
    assert found.base_moved is written


@pytest.mark.parametrize(
    ("now", "before", "moved", "change"),
    [
        (None, None, False, None),
        (ONE.to("meta"), ZERO, False, None),
        (ONE, ONE.clone(), False, None),
        (ONE, ZERO, True, ONE),
        (ONE, ZERO[:1], True, None),
        (ONE, ONE.double(), True, None),
        (ONE.int(), ZERO.int(), True, None),
    ],
    ids=["no weight", "meta", "the same", "another", "another shape", "another dtype", "whole numbers"],
)
def test_whether_the_weight_underneath_moved_and_by_what(
    now: Any, before: Any, moved: bool, change: Any
) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    updates = Updates(survey(model), cast("Any", SimpleNamespace(before=lambda tensor: before)))
    found = updates._base_change(updates._kept[0]._replace(weight=now))
    assert found[0] is moved
    assert (found[1] is None) is (change is None)
    assert change is None or torch.equal(cast("Any", found[1]), change)


def test_of_updates_without_numbers_it_is_said_why() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])).to("meta")
    (found,) = Updates(survey(model), cast("Any", SimpleNamespace(before=lambda tensor: None))).facts(
        ranks=True
    )
    assert (found.unknown, found.rank, found.base_moved) == (
        "its tensors are on the meta device",
        None,
        False,
    )


def of_values(*values: float, rows: int = 9, columns: int = 16) -> Tensor:
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    for i, value in enumerate(values):
        matrix[i, i] = value
    return matrix[None]


def test_singular_values_that_rounding_makes_are_none() -> None:
    # 8 sqrt(4) eps 2 (sqrt(9) + sqrt(16)) = 224 eps.
    eps = torch.finfo(torch.float32).eps
    assert _rank(of_values(1.0, 225 * eps), 4, torch.float32, 2.0) == 2
    assert _rank(of_values(1.0, 223 * eps), 4, torch.float32, 2.0) == 1
    assert _rank(of_values(1.0, 223 * eps), 4, torch.float64, 2.0) == 2
    assert _rank(of_values(), 4, torch.float32, 2.0) == 0
    assert _rank(torch.zeros(1, 0, 5), 4, torch.float32, 2.0) == 0
    assert _rank(torch.zeros(1, 5, 0), 4, torch.float32, 2.0) == 0
    several = torch.cat([of_values(1.0), of_values(1.0, 1.0, 1.0)])
    assert _rank(several, 4, torch.float32, 1.0) == 3


def test_large_matrices_are_sketched() -> None:
    def rank(size: int, of: int) -> int:
        return _rank(of_values(*[1.0] * of, rows=size, columns=size + 1), 2, torch.float64, 1.0)

    assert rank(512, 30) == 30
    assert rank(513, 30) == 2 + 8
    assert rank(513, 7) == 7


def test_how_far_a_weight_is_from_what_it_was() -> None:
    before = torch.tensor([3.0, 4.0])
    assert _distance(before.clone(), before) == 0.0
    assert _distance(torch.tensor([3.0, 5.0]), before) == pytest.approx(0.2)
    assert _distance(torch.tensor([3.0]), before) == 1.0
    assert _distance(before.double(), before) == 1.0
    assert _distance(before, torch.zeros(2)) == 1.0
    assert _distance(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    nan = torch.tensor([math.nan, 4.0])
    assert _distance(nan.clone(), nan) == 0.0
    assert math.isnan(_distance(torch.tensor([3.0, math.nan]), before))


def test_norms_and_moves() -> None:
    assert norms([torch.tensor([3.0, 4.0]), torch.zeros(2)]) == [5.0, 0.0]
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
    model.bias.requires_grad_(False)
    watch = Watch(model, {}, {id(model.weight): 0})
    assert watch.note_gradients() is None
    model.weight.grad = torch.full((1, 4), 0.5)
    assert watch.note_gradients() == 1.0
    with torch.no_grad():
        model.weight += torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    watch.note_moves()
    watch.note_moves()
    (weight,) = watch.facts()
    assert (weight.name, weight.module, weight.adapter, weight.part) == ("weight", "", "", "base")
    assert (weight.numbers, weight.trainable, weight.held, weight.finite) == (4, True, True, True)
    assert (weight.scale, weight.gradients, weight.moves, weight.stayed) == (
        2.0,
        (None, 1.0),
        (1.0, 0.0),
        0.0,
    )


def test_short_numbers_that_stay_are_counted() -> None:
    for dtype, stayed in ((torch.bfloat16, 0.75), (torch.float16, 0.75), (torch.float32, 0.0)):
        model = nn.Linear(4, 1, bias=False, dtype=dtype)
        watch = Watch(model, {}, {})
        with torch.no_grad():
            model.weight[0, 0] += 1.0
        watch.note_moves()
        assert watch.facts()[0].stayed == stayed
    meta = Watch(nn.Linear(4, 1, device="meta"), {}, {})
    assert meta.facts() == ()


# ---------------------------------------------------------------------------------- circumstances


def test_inputs_that_are_not_finite() -> None:
    bad = torch.tensor([1.0, math.inf])
    batch = {
        "values": bad,
        "causal_mask": bad,
        "attn_bias": bad,
        "soft_labels": bad,
        "ids": rows([1]),
        "text": "a",
    }
    good = {"values": torch.ones(2), "far": bad.to("meta")}
    assert list(spoiled_inputs((good, batch, [bad]))) == ["batch 1: values"]


def test_dropouts_that_act() -> None:
    modules = {
        "on": nn.Dropout(0.1),
        "zero": nn.Dropout(0.0),
        "off": nn.Dropout(0.1).eval(),
        "other": nn.ReLU(),
    }

    def layer(dropout: nn.Module, *active: str) -> Any:
        return SimpleNamespace(active_adapters=active, lora_dropout={"a": dropout})

    lora = {
        "drops": layer(nn.Dropout(0.1), "a"),
        "idle": layer(nn.Dropout(0.1), "b"),
        "none": layer(nn.Identity(), "a"),
        "eval": layer(nn.Dropout(0.1).eval(), "a"),
        "zero": layer(nn.Dropout(0.0), "a"),
    }
    found: Any = SimpleNamespace(modules=modules, lora=lora)
    assert list(live_dropouts(found)) == ["on", "drops.lora_dropout"]


@pytest.mark.parametrize(
    ("batches", "blank"),
    [
        (({"advantages": ZERO, "completion_mask": ZERO, "attention_mask": ZERO, "labels": ZERO},), "all"),
        (({"advantages": ONE},), ""),
        (({"advantages": ZERO}, {"advantages": ZERO}), "advantages"),
        (({"advantages": ZERO}, {"advantages": ONE}), ""),
        (({"advantages": ZERO}, {}), ""),
        (({"advantages": ZERO.to("meta")},), ""),
        (({"advantages": ZERO[:0]},), ""),
        (({"advantages": [0.0]},), ""),
        (([ZERO],), ""),
        ((), ""),
    ],
)
def test_weights_of_a_loss_that_are_zero_in_every_batch(batches: Any, blank: str) -> None:
    wanted = ["advantages", "completion_mask"] if blank == "all" else [blank] if blank else []
    assert list(blank_inputs(batches)) == wanted


def test_masks_that_are_shorter_than_their_tokens() -> None:
    def told(*shapes: Any) -> list[str]:
        ids, mask = (torch.ones(shape) for shape in shapes)
        return list(odd_masks(({"input_ids": ids, "attention_mask": mask},)))

    assert told((2, 4), (2, 3)) == ["batch 0: attention_mask of shape [2, 3], input_ids of [2, 4]"]
    assert (
        told((2, 4), (2, 4)) == told((2, 4), (2, 5)) == told((2, 4), (2, 1, 4, 3)) == told((4,), (2, 3)) == []
    )
    assert list(odd_masks(([ONE], {"input_ids": ONE}, {"attention_mask": ONE}))) == []


@pytest.mark.parametrize(
    ("batches", "rows"),
    [
        (({"texts": ["a"], "count": torch.tensor(5), "input_ids": ONE, "labels": ZERO[:1]},), 2),
        (({"texts": ["a"]},), 0),
        (([ONE],), 0),
        ((), 0),
    ],
)
def test_rows_are_those_of_the_first_tensor_that_has_any(batches: Any, rows: int) -> None:
    assert row_count(batches) == rows


def test_layers_in_the_packing_for_inference() -> None:
    def layer(**state: Any) -> Any:
        return SimpleNamespace(weight=SimpleNamespace(quant_state=SimpleNamespace(**state)))

    modules = {
        "on": layer(packing_format_for_cpu=True),
        "off": layer(packing_format_for_cpu=False),
        "gpu": layer(),
    }
    found: Any = SimpleNamespace(modules={**modules, "plain": nn.Linear(1, 1), "none": nn.ReLU()})
    assert list(repacked_layers(found)) == ["on"]


@pytest.mark.parametrize(
    ("name", "group", "floor"),
    [
        ("Adafactor", {"eps": (1e-30, 1e-3), "scale_parameter": True}, 1e-3),
        ("Adafactor", {"eps": [1e-30, 1e-3], "scale_parameter": False}, None),
        ("Adafactor", {"eps": (None, 1e-3), "beta2_decay": -0.8}, 1e-3),
        ("Adafactor", {"eps": (1e-30, 1e-3)}, None),
        ("Adafactor", {"eps": 1e-8, "scale_parameter": True}, None),
        ("Adafactor", {"scale_parameter": True}, None),
        ("CAME", {"eps": (1e-30, 1e-16), "scale_parameter": True}, None),
    ],
)
def test_the_size_below_which_adafactor_scales_its_rate_no_more(
    name: str, group: dict[str, Any], floor: float | None
) -> None:
    optimizer: Any = type(name, (), {})()
    assert _floor(optimizer, group) == floor
    assert _floor(SimpleNamespace(optimizer=optimizer), group) == floor


@pytest.mark.parametrize(
    ("rows", "sizes"), [(0, [1] * 8), (3, [3, 3, 3]), (10, [10]), (64, [64]), (1000, [64])]
)
def test_a_few_rows_of_a_loader_are_read_and_no_more(rows: int, sizes: list[int]) -> None:
    loader = SimpleNamespace(dataset=range(100), collate_fn=lambda found: {"ids": found})
    batches, why = first_rows(loader, rows)
    assert ([len(batch["ids"]) for batch in batches], why) == (sizes, "")
    assert [number for batch in batches for number in batch["ids"]] == list(range(sum(sizes)))


@pytest.mark.parametrize(
    ("error", "phase", "length", "kind"),
    [
        (RuntimeError("index out of range in self"), "forward pass", 4, "index"),
        (RuntimeError("index out of range in self"), "forward pass", 9, "text too long"),
        (RuntimeError("index out of range in self"), "forward pass", 8, "index"),
        (RuntimeError("index out of range in self"), "backward pass", 9, "index"),
        (RuntimeError("The size of tensor a"), "optimizer step", 4, "state of another shape"),
        (RuntimeError("The size of tensor a"), "backward pass", 4, None),
        (RuntimeError("something"), "optimizer step", 4, None),
        (torch.OutOfMemoryError("index out of range"), "forward pass", 4, None),
        (OSError("index out of range"), "forward pass", 4, None),
    ],
)
def test_what_an_error_says(error: Exception, phase: Any, length: int, kind: str | None) -> None:
    model: Any = nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=8)
    found = failure_of(error, phase, model, {"input_ids": torch.ones(2, length)}, step=3, index=1)
    assert (found and found.kind) == kind
    if found is not None:
        assert (found.step, found.batch, found.length, found.positions) == (3, 1, length, 8)


def test_only_the_first_line_of_an_error_is_kept() -> None:
    error = RuntimeError("index out of range " + "x" * 400 + "\nmore")
    found = failure_of(error, "forward pass", nn.Module(), {"input_ids": torch.ones(4)}, step=1, index=0)
    assert found is not None
    assert (len(found.message), found.length, found.positions) == (300, None, None)


class Layer(nn.Module):
    disable_adapters = False
    active_adapter = "default"

    def forward(self, values: Any = None) -> Any:
        return values


def test_how_layers_were_run() -> None:
    layers = {name: Layer() for name in ("graph", "both", "without", "cut", "empty", "named", "never")}
    calls = Passed()
    calls.follow(layers)
    one = torch.ones(1)
    layers["graph"](one)
    with torch.no_grad():
        layers["both"](one)
        layers["without"](one)
    layers["both"](one)
    with torch.no_grad():
        layers["both"](one)
    torch.utils.checkpoint.checkpoint(layers["cut"], one, use_reentrant=True)
    layers["empty"](torch.ones(0))
    layers["named"](values=one)
    assert calls.ran == {
        "graph": Ran.WITH_GRAPH,
        "both": Ran.WITH_GRAPH,
        "without": Ran.WITHOUT_GRAPH,
        "cut": Ran.CUT,
        "named": Ran.WITH_GRAPH,
    }
    assert not calls.switched_off
    assert calls.references(("default",)) == ()
    layers["both"].active_adapter = layers["graph"].active_adapter = "reference"
    layers["graph"](one)
    assert calls.references(("default",)) == (), "it ran with gradients on"
    with torch.no_grad():
        layers["both"](one)
    assert calls.references(("default",)) == ("reference",)
    layers["never"].disable_adapters = True
    layers["never"](one)
    layers["graph"](one)
    assert calls.switched_off


# ---------------------------------------------------------------------------------- batches


def plain_loss(model: Any, batch: Any) -> Tensor:
    return torch.zeros(())


def test_how_many_batches_are_taken() -> None:
    batch = {"input_ids": IDS}
    assert take_batches(batch, 5, None) == (batch,)
    assert len(take_batches([batch] * 100, 5, None)) == LOOKED_AT == 64
    assert len(take_batches([batch] * 100, 70, None)) == 70
    assert len(take_batches(iter([batch] * 100), 5, None)) == 5
    assert len(take_batches(iter([batch] * 100), 0, None)) == 1
    with pytest.raises(ValueError, match="batches is empty"):
        take_batches([], 1, None)
    with pytest.raises(TypeError, match="from names of the model's arguments"):
        take_batches([{1: IDS}], 1, None)
    with pytest.raises(TypeError, match="give loss_fn"):
        take_batches([IDS], 1, None)
    assert take_batches(IDS, 1, plain_loss)[0] is IDS
    assert take_batches((IDS, IDS), 1, plain_loss) == ((IDS, IDS),)
    assert take_batches(((IDS,), (IDS,)), 1, plain_loss) == ((IDS,), (IDS,))
    for wrong in (IDS, "ab", b"ab", nn.Linear(1, 1), 3):
        with pytest.raises(TypeError, match="batches must be a batch"):
            require_batches(wrong, None)


def test_generators_of_a_loader() -> None:
    one, two, three = (torch.Generator() for _ in range(3))
    loader = SimpleNamespace(
        generator=one,
        sampler=SimpleNamespace(generator=two),
        batch_sampler=SimpleNamespace(generator=one, sampler=SimpleNamespace(generator=three)),
    )
    assert list(generators_of(loader)) == [one, two, three]
    assert list(generators_of([1])) == []
    assert list(generators_of(SimpleNamespace(generator=3))) == []


class Gives(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, **batch: Any) -> Any:
        return self.output


def test_the_loss_of_a_batch() -> None:
    loss = torch.tensor(2.0)
    for output in (SimpleNamespace(loss=loss), {"loss": loss}, (loss, 3), loss, torch.tensor([2.0])):
        assert float(loss_of(Gives(output), {"a": 1}, None)) == 2.0
    for output in (SimpleNamespace(loss=None), {}, (), torch.ones(2), torch.tensor(1j), 3.0):
        with pytest.raises(ValueError, match="no scalar loss for a batch of a"):
            loss_of(Gives(output), {"a": 1}, None)
    with pytest.raises(ValueError, match=r"not a tensor of shape \(2,\) and torch.float32"):
        loss_of(Gives(None), None, lambda model, batch: torch.ones(2))
    with pytest.raises(ValueError, match="must return a scalar tensor, not 3"):
        loss_of(Gives(None), None, lambda model, batch: 3)


def test_labels_outside_of_the_vocabulary() -> None:
    values = torch.tensor([-3, -1, 0, 1, 4, 5, 9])
    assert _outside(values, None) == (-3, -1)
    assert _outside(values, 5) == (-3, -1, 5, 9)
    assert _outside(torch.arange(-8, 0), None) == (-8, -7, -6, -5, -4)


def test_labels_across_documents_need_positions() -> None:
    labels = rows([1, 2, 3, 4])
    assert _crossing(labels, {}) == (0, 0)
    assert _crossing(labels, {"position_ids": torch.zeros(1, 3, dtype=torch.long)}) == (0, 0)


@pytest.mark.parametrize(("apart", "holds"), [(0.25, True), (0.2500001, False), (0.0, True)])
def test_a_text_may_be_as_far_apart_as_rounding_makes_it(apart: float, holds: bool) -> None:
    known: dict[str, Any] = {"company": "padding", "side": "right", "mask": "hides", "positions": False}
    facts = AloneFacts(
        0, 0, 8, pooled=False, apart=apart, tolerance=0.25, filler=0, pad=0, cached=False, **known
    )
    assert facts.holds == holds


def test_a_model_in_no_wrapper_hides_nothing() -> None:
    assert (Wrappers().unseen, Wrappers().ranks) == (0, 1)


def test_a_base_weight_that_changed_says_how_fine_its_numbers_are() -> None:
    found: Any = SimpleNamespace(lora={"q": None})
    held = partial(_Held, "q.weight", "q", "weight", batch_norm=False)
    whole = held(tensor=torch.tensor([1, 2, 3, 5], dtype=torch.int8))
    (change,) = _changed(whole, torch.tensor([1, 2, 3, 4], dtype=torch.int8), "probe", found)
    assert (change.relative, change.precision, change.adapted, change.trainable) == (0.25, 0.0, True, False)
    short = held(tensor=torch.tensor([2.0]).bfloat16())._replace(module="k")
    (change,) = _changed(short, torch.tensor([1.0]).bfloat16(), "snapshot", found)
    assert (change.relative, change.precision, change.adapted) == (1.0, 2**-7, False)
    assert not [*_changed(short, short.tensor.clone(), "probe", found)]


@pytest.mark.parametrize(
    ("loss", "ahead", "forgotten"),
    [(2.0, 2.001, True), (2.0, 2.0001, False), (2.0, 2.5, True), (2.5, 2.5, False), (2.001, 2.5, False)],
)
def test_labels_that_are_not_shifted_show_in_two_losses(loss: float, ahead: float, forgotten: bool) -> None:
    assert ShiftFacts(loss=loss, in_place=2.0, ahead=ahead).forgotten is forgotten
