"""What a batch says of its labels, on a few tokens each."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_lora.facts.batches import LabelFacts
from pytest_lora.inspection.training.labels import label_facts
from pytest_lora.inspection.training.special_tokens import Vocabulary, vocabulary

N = -100
PAD, BEGIN, END = 0, 1, 2


def words(**changes: Any) -> Vocabulary:
    usual = Vocabulary(
        task="CAUSAL_LM",
        rows=50,
        outputs=50,
        classes=3,
        pad=PAD,
        begin=BEGIN,
        decoder_start=None,
        ends=(END,),
        single_label=True,
        both_ways=False,
        stops=(END,),
        opens=None,
        positions=None,
    )
    return usual._replace(**changes)


def facts(batch: dict[str, Any], **changes: Any) -> LabelFacts:
    (found,) = label_facts(({name: torch.tensor(rows) for name, rows in batch.items()},), words(**changes))
    return found


def holds(found: LabelFacts, wanted: dict[str, Any]) -> None:
    assert {name: getattr(found, name) for name in wanted} == wanted


def text(ids: Any, labels: Any = None, mask: Any = None) -> dict[str, Any]:
    """A batch whose labels are its inputs, if no others are given."""
    batch = {"input_ids": ids, "labels": ids if labels is None else labels}
    return batch if mask is None else {**batch, "attention_mask": mask}


TEXT = [[1, 5, 6, 7, 2], [1, 8, 9, 2, 0]]
SHOWN = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("batch", "changes", "wanted"),
    [
        (
            text(TEXT, TEXT, SHOWN),
            {},
            {"labels": 8, "total": 8, "unlabelled": 0, "rows": 2, "rows_ignored": 0, "padding": 1},
        ),
        (
            text(TEXT, [[N, N, 6, 7, 2], [N] * 5], SHOWN),
            {},
            {"labels": 3, "total": 8, "unlabelled": 4, "rows_ignored": 1, "padding": 0, "end_targets": 1, "ends": 1},
        ),
        (text(TEXT, [[1, N, N, N, N], [N] * 5]), {}, {"labels": 0, "rows_ignored": 2, "unlabelled": 8}),
        # A mask made as input_ids != pad hides the end token too, whose label is meant.
        (
            text([[1, 5, 6, 2, 2]], [[1, 5, 6, 2, 2]], [[1, 1, 1, 0, 0]]),
            {"pad": END},
            {"padding": 1, "ends": 0, "padding_ends": 1},
        ),
        (
            text([[1, 5, 6, 2, 2]], [[1, 5, 6, 2, N]], [[1, 1, 1, 0, 0]]),
            {"pad": END},
            {"padding": 0, "ends": 0, "padding_ends": 1},
        ),
        # Without a mask the padding token tells, where two of it or more end a row.
        (text([[1, 5, 0, 0]]), {}, {"padding": 2, "padding_by": "pad_token_id"}),
        (text([[1, 5, 6, 0]]), {}, {"padding": 0}),
        (text([[0, 0, 0, 0]]), {}, {"padding": 0}),
        (text([[1, 0, 0, 0]], [[1, N, 0, N]]), {}, {"padding": 1}),
        (text([[1, 5, 0, 0]], [[1, 5, 0, 0]], [[1, 1, 1, 1]]), {}, {"padding": 2, "padding_by": "pad_token_id"}),
        # Where the end token pads, the first of three or more is text.
        (text([[1, 5, 2, 2, 2]]), {"pad": END}, {"padding": 2, "padding_by": "eos_token_id"}),
        (text([[1, 5, 2, 2, 2]]), {"pad": None}, {"padding": 2, "padding_by": "eos_token_id"}),
        (text([[1, 5, 6, 2, 2]]), {"pad": END}, {"padding": 0}),
        (text([[1, 5, 2, 2, 2]], [[1, 5, 2, 2, N]]), {"pad": END}, {"padding": 1}),
        # Several texts in a row: each end that closes one counts.
        (text([[5, 2, 6, 2, 7]]), {}, {"ends": 0, "end_targets": 2}),
        (text([[5, 6, 7, 2]], [[N, 6, 7, 2]]), {}, {"ends": 1, "end_targets": 1}),
        (text([[5, 6, 7, 2]], [[N, 6, N, 2]]), {}, {"ends": 0, "end_targets": 1}),
        (text([[5, 6, 2, 0, 0]], [[5, 6, N, N, N]]), {}, {"ends": 1, "end_targets": 0}),
        (text([[5, 6, 7, 2]]), {"ends": ()}, {"ends": 0, "end_targets": 0}),
        # Tokens that there are none of.
        (text([[1, 5, 6]], [[1, 5, 49]]), {}, {"outside": (), "ids_outside": ()}),
        (text([[1, 50, -1]], [[99, 50, -5]]), {}, {"outside": (-5, 50), "ids_outside": (-1, 50)}),
        (text([[1, 50, 5]], [[1, 90, -5]]), {"outputs": None, "rows": None}, {"outside": (-5,), "ids_outside": ()}),
        (text([[1, 60, 61, 62, 63, 64, 65]]), {}, {"outside": (60, 61, 62, 63, 64)}),
        # Where labels stand beside their inputs.
        (text([[3, 4, 5, 6]]), {}, {"same": 1.0, "ahead": 0.0, "behind": 0.0}),
        (text([[3, 4, 5, 6]], [[4, 5, 6, N]]), {}, {"same": 0.0, "ahead": 1.0, "behind": 0.0}),
        (text([[3, 4, 5, 6]], [[N, 3, 4, 9]]), {}, {"same": 0.0, "ahead": 0.0, "behind": pytest.approx(2 / 3)}),
        (text([[3, 4, 5, 6]], [[N] * 4]), {}, {"same": 0.0, "ahead": 0.0, "behind": 0.0}),
        (text([[9, 9, 3, 9]], [[5, 6, N, 7]]), {}, {"masked_inputs": True}),
        (text([[9, 8, 3, 9]], [[5, 6, N, 7]]), {}, {"masked_inputs": False}),
        # Padding that is looked at, on the left.
        (text([[0, 0, 5, 6]], [[N, N, 5, 6]]), {}, {"attended_padding": 1, "padded_at": "left"}),
        (text([[0, 0, 5, 6]]), {}, {"attended_padding": 0}),
        (text([[0, 4, 5, 6]], [[N, 4, 5, 6]]), {}, {"attended_padding": 0}),
        (text([[0, 0, 5, 6]], [[N, N, 5, 6]], [[0, 0, 1, 1]]), {}, {"attended_padding": 0}),
        (text([[0, 0, 5, 6]], [[N, N, 5, 6]], [[1, 1]]), {}, {"attended_padding": 0}),
        ({"input_ids": [[0, 0, 5, 6]], "labels": [[N, N, 5, 6]], "pixel_values": [[1.0]]}, {}, {"attended_padding": 0}),
        (text([[0, 0, 5, 6]], [[N, N, 5, 6]]), {"pad": None}, {"attended_padding": 0}),
        (text([[5, 6, 0, 0]], [[5, 6, N, N]]), {}, {"attended_padding": 0, "padded_at": "right"}),
        (text([[5, 6, 0, 0]], [[5, 6, N, N]]), {"both_ways": True}, {"attended_padding": 1, "padded_at": "right"}),
        # Two begin tokens, after any padding on the left.
        (text([[1, 1, 5]], [[N, N, 5]]), {}, {"double_starts": 1}),
        (text([[1, 5, 1]], [[N, 5, 1]]), {}, {"double_starts": 0}),
        (text([[0, 0, 1, 1, 5], [1, 1, 5, 6, 7]], [[N] * 4 + [5], [N] * 4 + [7]]), {}, {"double_starts": 2}),
        (text([[7, 1, 1, 5]], [[N, N, N, 5]], [[0, 1, 1, 1]]), {}, {"double_starts": 1}),
        (text([[1, 1, 1]]), {}, {"double_starts": 0}),
        (text([[1, 1, 5]], [[N, N, 5]]), {"begin": None}, {"double_starts": 0}),
        (text([[2, 2, 5]], [[N, N, 5]]), {"begin": END}, {"double_starts": 0}),
        (text([[0, 0, 5]], [[N, N, 5]]), {"begin": PAD}, {"double_starts": 0}),
        (text([[1, 1]], [[1, 5]]), {}, {"double_starts": 0}),
        (text([[5, 6, 7, 1]], [[5, 6, 7, 1]], [[0, 0, 0, 1]]), {}, {"double_starts": 0}),
        # Positions that do not count.
        ({**text([[3, 4, 5, 6]] * 2), "position_ids": [[2, 2, 2, 2], [0, 1, 2, 3]]}, {}, {"still_positions": 1}),
        ({"input_ids": [[3, 4, 5]], "labels": [[3, 4, 5]], "position_ids": [[2, 2, 2]]}, {}, {"still_positions": 0}),
        ({**text([[3, 4, 5, 6]]), "position_ids": [2, 2, 2, 2]}, {}, {"still_positions": 0}),
    ],
)  # fmt: skip
def test_labels_of_a_causal_model(batch: Any, changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = facts(batch, **changes)
    assert (found.batch, found.kind, found.visible) == (0, "causal", 0.0)
    holds(found, wanted)


@pytest.mark.parametrize(
    ("batch", "changes", "wanted"),
    [
        (text([[5, 6]], [[7, 8, 0, 0]]), {}, {"labels": 4, "total": 4, "padding": 2, "padding_by": "pad_token_id"}),
        (text([[5, 6]], [[7, 8, N, N]]), {}, {"labels": 2, "padding": 0, "unlabelled": 2}),
        (text([[5, 6]], [[7, 8, 0, 0]]), {"pad": None}, {"padding": 0}),
        (text([[5, 6, 0, 0]], [[7, 8]]), {}, {"attended_padding": 1, "padded_at": "right"}),
        (text([[0, 0, 5, 6]], [[7, 8]]), {}, {"attended_padding": 1, "padded_at": "left"}),
        ({"labels": [[7, 8, N]], "decoder_input_ids": [[7, 9, 5]]}, {}, {"visible": 0.5}),
        ({"labels": [[7, 8, N]], "decoder_input_ids": [[7, 9]]}, {}, {"visible": 0.0}),
        ({"labels": [[N, N]], "decoder_input_ids": [[7, 9]]}, {}, {"visible": 0.0, "rows_ignored": 1}),
        ({"labels": [[7, 50]]}, {}, {"outside": (50,), "limit": 50, "same": 0.0, "masked_inputs": False}),
        ({"labels": [[7, 50]]}, {}, {"ahead": 0.0, "behind": 0.0}),
    ],
)  # fmt: skip
def test_labels_of_a_decoder(batch: Any, changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = facts(batch, task="SEQ_2_SEQ_LM", **changes)
    assert (found.kind, found.ends, found.double_starts) == ("sequence", 0, 0)
    holds(found, wanted)


@pytest.mark.parametrize(
    ("task", "labels", "changes", "wanted"),
    [
        (
            "SEQ_CLS",
            [0, 2, 3],
            {},
            {"kind": "classes", "limit": 3, "outside": (3,), "labels": 3, "rows": 3, "padding": 0},
        ),
        ("SEQ_CLS", [0, N], {}, {"labels": 1, "rows_ignored": 1}),
        ("SEQ_CLS", [[0, 1]], {}, None),
        ("SEQ_CLS", [0, 1], {"single_label": False}, None),
        ("TOKEN_CLS", [[0, 2, N]], {}, {"kind": "tokens", "limit": 3, "labels": 2, "total": 3}),
        ("TOKEN_CLS", [0, 2], {}, None),
        ("QUESTION_ANS", [[0, 2]], {}, None),
        ("CAUSAL_LM", [[1, 5]], {}, None),
        (None, [0, 1], {}, None),
    ],
)
def test_labels_of_classes(
    task: str | None, labels: Any, changes: Any, wanted: dict[str, Any] | None
) -> None:
    found = list(label_facts(({"labels": torch.tensor(labels)},), words(task=task, **changes)))
    assert len(found) == (wanted is not None)
    holds(found[0], wanted) if wanted is not None else None


@pytest.mark.parametrize(("odd", "kind"), [(0, "causal"), (1, "causal"), (2, None)])
def test_a_model_of_unknown_class_is_causal_where_labels_are_inputs(odd: int, kind: str | None) -> None:
    ids = torch.arange(3, 23)[None]
    labels = ids.clone()
    labels[0, :odd] += 1
    found = list(label_facts(({"input_ids": ids, "labels": labels},), words(task=None)))
    assert [one.kind for one in found] == ([] if kind is None else [kind])
    for other in (labels[:, 1:], torch.full_like(ids, N), labels.float()):
        assert not list(label_facts(({"input_ids": ids, "labels": other},), words(task=None)))


def test_batches_are_numbered_and_odd_ones_left_out() -> None:
    ids = torch.tensor([[1, 5, 6]])
    batches = (
        [1, 2],
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids},
        {"input_ids": ids, "labels": ids.to("meta")},
    )
    assert [one.batch for one in label_facts(batches, words())] == [1]
    assert {one.name for one in fields(LabelFacts)} >= {"batch", "visible"}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {"ends": (), "pad": None, "begin": None, "classes": None, "single_label": True}),
        ({"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}, {"ends": (2,), "pad": 0, "begin": 1}),
        ({"eos_token_id": [2, 3], "pad_token_id": "0"}, {"ends": (2, 3), "pad": None}),
        ({"num_labels": 1}, {"classes": 1, "single_label": False}),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, {"single_label": True}),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            {"classes": 3, "single_label": False},
        ),
        ({"num_labels": 2}, {"single_label": True}),
    ],
)
def test_special_tokens_are_those_of_the_configuration(
    config: dict[str, Any], wanted: dict[str, Any]
) -> None:
    base: Any = SimpleNamespace(architecture="Own", task_type="CAUSAL_LM", vocab_size=50)
    root: Any = torch.nn.Module()
    root.config = SimpleNamespace(**config)
    found = vocabulary(root, base)
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert found.outputs == 50
    root.get_output_embeddings = lambda: torch.nn.Linear(4, 60)
    assert vocabulary(root, base).outputs == 60
    root.get_output_embeddings = lambda: SimpleNamespace(
        out_features=4, original_module=torch.nn.Linear(4, 70)
    )
    assert vocabulary(root, base).outputs == 70


def positions(*, rotary: bool = True, **config: Any) -> int | None:
    root: Any = torch.nn.Module()
    if rotary:
        root.turn = type("OwnRotaryEmbedding", (torch.nn.Module,), {})()
    root.config = SimpleNamespace(**{"max_position_embeddings": 12, **config})
    base: Any = SimpleNamespace(architecture="Own", task_type="CAUSAL_LM", vocab_size=50)
    return vocabulary(root, base).positions


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_positions_are_those_of_a_rotation_that_is_not_rescaled(field: str, key: str) -> None:
    assert positions(**{field: {key: "default", "rope_theta": 1e4}}) == 12
    assert positions(**{field: {key: "linear", "factor": 2.0}}) is None
    near, far = {key: "default"}, {key: "yarn"}
    assert positions(**{field: {"near": near, "far": near}}) == 12
    assert positions(**{field: {"near": near, "far": far}}) is None


def test_positions_that_nothing_is_said_of() -> None:
    assert positions() == positions(rope_scaling=None) == 12
    assert positions(rotary=False) is None, "learned positions raise"
    assert positions(max_position_embeddings=None) is None


@pytest.mark.parametrize(
    ("family", "needs"),
    [("gemma", True), ("gemma2", True), ("gemma3_text", True), ("gemma3n_text", True), ("llama", False)]
    + [(name, False) for name in ("t5gemma", "gemma_like", "shieldgemma2", "")],
)
def test_bases_that_cannot_do_without_a_begin_token(family: str, needs: bool) -> None:
    root: Any = torch.nn.Module()
    root.config = SimpleNamespace(model_type=family, bos_token_id=0)
    base: Any = SimpleNamespace(architecture="Own", task_type="CAUSAL_LM", vocab_size=50)
    assert vocabulary(root, base).opens == (0 if needs else None)
    root.config.bos_token_id = None
    assert vocabulary(root, base).opens is None


def test_tokens_at_which_generation_stops_are_added_to_the_ends() -> None:
    root: Any = torch.nn.Module()
    root.config = SimpleNamespace(eos_token_id=2)
    root.generation_config = SimpleNamespace(eos_token_id=[2, 9])
    base: Any = SimpleNamespace(architecture="Own", task_type="CAUSAL_LM", vocab_size=50)
    found = vocabulary(root, base)
    assert (found.ends, found.stops) == ((2,), (2, 9))
