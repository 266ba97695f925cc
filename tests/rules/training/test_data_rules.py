"""Labels, padding, positions, and the loss that is made of them: faults named, healthy trainings left alone."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from pytest_lora import Report, check_training
from pytest_lora.bases.examples.models import (
    VOCABULARY,
    classifier_batch,
    image_batch,
    language_batch,
)
from pytest_lora.facts.steps import Failure, FailureKind
from pytest_lora.rules.training import step_raises
from tests.rules.training.setups import (
    END,
    Build,
    adapted,
    bert,
    bert_base,
    leave_alone,
    name_the_fault,
    t5,
    with_labels,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def padding_with_minus_one() -> Report:
    return check_training(adapted(), with_labels(lambda b: b["labels"][:, :3].fill_(-1)))


def one_class_too_many() -> Report:
    batch = classifier_batch()
    batch["labels"] = torch.arange(8) % 3 + 1
    return check_training(adapted("classifier_base", task_type="SEQ_CLS"), batch)


def token_without_a_row() -> Report:
    return check_training(adapted(), with_labels(lambda b: b["input_ids"][0, :2].fill_(VOCABULARY + 7)))


def ends_masked_with_the_padding() -> Report:
    model = adapted()
    model.config.eos_token_id = model.config.pad_token_id = END
    batch = language_batch()
    batch["input_ids"][:2, 9:] = END
    batch["input_ids"][2:, -1] = END
    batch["attention_mask"][:2, 10:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == END, -100)
    return check_training(model, batch)


def padding_without_a_mask() -> Report:
    batch = language_batch()
    batch["input_ids"][:, 8:] = 0
    del batch["attention_mask"]
    batch["labels"] = batch["input_ids"].clone()
    return check_training(adapted(), batch)


def padding_on_the_left() -> Report:
    batch = language_batch()
    batch["attention_mask"][:2, :6] = 0
    return check_training(adapted(), batch)


def padded_labels_of_a_decoder() -> Report:
    batch = language_batch()
    batch["labels"][:, 9:] = 0
    return check_training(adapted(t5(), target_modules=["q", "v"]), batch)


def some_batches_ignored() -> Report:
    empty = with_labels(lambda b: b["labels"].fill_(-100))
    return check_training(adapted(), [language_batch(), language_batch(), language_batch(), empty])


def answers_cut_off() -> Report:
    return check_training(adapted(), with_labels(lambda b: b["labels"][:3].fill_(-100)))


def only_the_first_label_is_left() -> Report:
    return check_training(adapted(), with_labels(lambda b: b["labels"][:, 1:].fill_(-100)))


def shifted_twice() -> Report:
    def shift(batch: dict[str, torch.Tensor]) -> None:
        batch["labels"] = torch.cat([batch["input_ids"][:, 1:], torch.full((4, 1), -100)], 1)

    return check_training(adapted(), with_labels(shift))


def shifted_the_wrong_way() -> Report:
    def shift(batch: dict[str, torch.Tensor]) -> None:
        batch["labels"] = torch.cat([torch.full((4, 1), -100), batch["input_ids"][:, :-1]], 1)

    return check_training(adapted(), with_labels(shift))


def summed_over_tokens() -> Report:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )

    return check_training(adapted(), language_batch(), loss_fn=loss)


def summed_over_accumulation() -> Report:
    batches = [language_batch() for _ in range(4)]
    return check_training(adapted(), batches, history=[19.5, 19.4, 19.4, 19.3])


def infinite_inputs() -> Report:
    model = adapted("batchnorm_base", target_modules=["conv"]).eval()
    batch = image_batch()
    batch["pixel_values"][0, 0, 0, 0] = float("inf")
    return check_training(model, batch)


def loss_that_divides_by_zero() -> Report:
    return check_training(adapted(), language_batch(), loss_fn=lambda m, b: m(**b).loss / 0)


def loss_times_zero() -> Report:
    return check_training(adapted(), language_batch(), loss_fn=lambda m, b: m(**b).loss * 0.0)


def classes_summed_over_accumulation() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    batches = [classifier_batch() for _ in range(6)]
    with torch.no_grad():
        total = sum(float(model(**batch).loss) for batch in batches)
    return check_training(model, batches, history=[total, total])


def text_longer_than_the_positions() -> Report:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=8))
    return check_training(adapted(base, target_modules=["c_attn"]), language_batch())


def labels_longer_than_the_text() -> Report:
    return check_training(adapted(), {**language_batch(), "labels": language_batch(length=20)["labels"]})


def question_as_input_answer_as_labels() -> Report:
    return check_training(adapted(), {**language_batch(), "labels": language_batch()["labels"]})


def padding_on_the_left_without_a_mask() -> Report:
    batch = language_batch()
    del batch["attention_mask"]
    for row, padding in enumerate((0, 2, 4, 6)):
        batch["input_ids"][row, :padding] = 0
        batch["labels"][row, :padding] = -100
    return check_training(adapted(), batch)


def unmasked_padding_of_an_encoder() -> Report:
    batch = {**language_batch(), "labels": torch.tensor([0, 1, 2, 0])}
    batch["input_ids"][:, 12:] = 0
    return check_training(bert(), batch)


def text_begins_twice_behind_padding() -> Report:
    model = adapted()
    model.config.bos_token_id = 1
    batch = language_batch()
    batch["input_ids"][:, 4:6] = 1
    batch["labels"] = batch["input_ids"].clone()
    for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        batch[name][:, :4] = padding
    return check_training(model, batch)


def end_tokens_pad_without_a_mask() -> Report:
    model = adapted()
    model.config.eos_token_id, model.config.pad_token_id = END, None
    batch = language_batch()
    del batch["attention_mask"]
    batch["input_ids"][:, 9:] = END
    batch["labels"] = batch["input_ids"].clone()
    return check_training(model, batch)


def nan_in_a_later_batch() -> Report:
    model = adapted("batchnorm_base", target_modules=["conv"]).eval()
    batches = [image_batch() for _ in range(5)]
    batches[4]["pixel_values"][0, 0, 0, 0] = float("nan")
    return check_training(model, batches)


FAULTS: dict[Build, tuple[str, str]] = {
    padding_with_minus_one: ("LORA323", "-1"),
    one_class_too_many: ("LORA323", "3: outside the classes of 3"),
    token_without_a_row: ("LORA323", "input_ids"),
    ends_masked_with_the_padding: ("LORA322", "end token"),
    padding_without_a_mask: ("LORA321", "pad_token_id"),
    padding_on_the_left: ("LORA321", "attention_mask"),
    padded_labels_of_a_decoder: ("LORA321", "padding has labels"),
    some_batches_ignored: ("LORA320", "1 of 4 batches"),
    answers_cut_off: ("LORA320", "3 of 4 rows"),
    only_the_first_label_is_left: ("LORA320", "all labels are -100"),
    shifted_twice: ("LORA324", "shifted already"),
    shifted_the_wrong_way: ("LORA324", "equal the previous input token"),
    summed_over_tokens: ("LORA325", "summed over 60 labels"),
    summed_over_accumulation: ("LORA325", "sum over 4 accumulation steps"),
    infinite_inputs: ("LORA310", "step 1"),
    loss_that_divides_by_zero: ("LORA310", "inf"),
    loss_times_zero: ("LORA311", "exactly 0"),
    classes_summed_over_accumulation: ("LORA325", "sum over 6 accumulation steps"),
    text_longer_than_the_positions: ("LORA319", "16 tokens long, and the model has 8 positions"),
    labels_longer_than_the_text: ("LORA319", "the length of input_ids"),
    question_as_input_answer_as_labels: ("LORA326", "another text"),
    padding_on_the_left_without_a_mask: ("LORA327", "3 of 4 rows"),
    unmasked_padding_of_an_encoder: ("LORA327", "on the right"),
    text_begins_twice_behind_padding: ("LORA328", "4 of 4 rows"),
    end_tokens_pad_without_a_mask: ("LORA321", "eos_token_id"),
    nan_in_a_later_batch: ("LORA310", "batch 4: pixel_values"),
}


def packed_without_ends() -> Report:
    model = adapted()
    model.config.eos_token_id = END
    batch = language_batch()
    del batch["attention_mask"]
    return check_training(model, batch)


def end_token_pads_and_is_learned() -> Report:
    model = adapted()
    model.config.eos_token_id = model.config.pad_token_id = END
    batch = language_batch()
    batch["input_ids"][:, 9:] = END
    batch["attention_mask"][:, 10:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return check_training(model, batch)


def end_token_pads_and_the_mask_hides_it() -> Report:
    model = adapted()
    model.config.eos_token_id = model.config.pad_token_id = END
    batch = language_batch()
    batch["input_ids"][:, 9:] = END
    batch["attention_mask"][:, 9:] = 0
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 10:] = -100
    return check_training(model, batch)


def conversation_with_masked_turns() -> Report:
    model = adapted()
    model.config.eos_token_id = END
    batch = language_batch()
    batch["input_ids"][:, [5, 15]] = END
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :6] = -100
    return check_training(model, batch)


def padded_decoder() -> Report:
    batch = language_batch()
    batch["labels"][:, 9:] = -100
    return check_training(adapted(t5(), target_modules=["q", "v"]), batch)


def one_repeated_token() -> Report:
    batch = with_labels(lambda b: b["input_ids"].fill_(7))
    batch["labels"] = batch["input_ids"].clone()
    return check_training(adapted(), batch)


def shifted_for_a_loss_of_ones_own() -> Report:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    batch = with_labels(lambda b: b.update(labels=b["input_ids"].roll(-1, 1)))
    return check_training(adapted(), batch, loss_fn=loss)


def regression() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    model.config.problem_type = "multi_label_classification"
    batch = {**classifier_batch(), "labels": torch.rand(8, 3)}
    return check_training(model, batch)


def history_of_easier_data() -> Report:
    return check_training(adapted(), [language_batch()] * 4, history=[2.5, 2.2, 2.0, 1.9])


def loss_of_two_parts() -> Report:
    return check_training(adapted(), language_batch(), loss_fn=lambda m, b: 2 * m(**b).loss)


def numbers_without_a_point_as_targets() -> Report:
    model = adapted(bert_base(outputs=1), target_modules=["query", "value"], task_type="SEQ_CLS")
    return check_training(model, {**language_batch(), "labels": torch.tensor([-2, 0, 5, 3])})


def losses_of_single_rows() -> Report:
    history = [0.6, 1.9, 2.1, 2.0, 1.8]
    return check_training(adapted(), language_batch(), history=history)


def classes_learned_from_a_bad_start() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    return check_training(model, [classifier_batch() for _ in range(4)], history=[4.9, 4.1, 3.2, 2.6])


def inputs_masked_where_labels_count() -> Report:
    batch = language_batch()
    masked = torch.rand(batch["input_ids"].shape) < 0.4
    batch["labels"] = batch["labels"].masked_fill(~masked, -100)
    batch["input_ids"] = batch["input_ids"].masked_fill(masked, 7)
    return check_training(adapted(), batch)


def padding_on_the_right_without_a_mask() -> Report:
    batch = language_batch()
    del batch["attention_mask"]
    batch["input_ids"][:, 10:] = 0
    batch["labels"][:, 10:] = -100
    return check_training(adapted(), batch)


def classes_padded_on_the_right_of_a_causal_model() -> Report:
    batch = classifier_batch()
    del batch["attention_mask"]
    batch["input_ids"][:, 9:] = 0
    return check_training(adapted("classifier_base", task_type="SEQ_CLS"), batch)


def encoder_with_its_padding_masked() -> Report:
    batch = {**language_batch(), "labels": torch.tensor([0, 1, 2, 0])}
    batch["input_ids"][:, 12:] = 0
    batch["attention_mask"][:, 12:] = 0
    return check_training(bert(), batch)


def begin_token_that_ends_and_pads() -> Report:
    model = adapted()
    model.config.bos_token_id = model.config.eos_token_id = END
    batch = language_batch()
    batch["input_ids"][:, :3] = END
    batch["labels"] = batch["input_ids"].clone()
    return check_training(model, batch)


def two_end_tokens_close_a_text() -> Report:
    model = adapted()
    model.config.eos_token_id, model.config.pad_token_id = END, None
    batch = language_batch()
    batch["input_ids"][:, -2:] = END
    batch["labels"] = batch["input_ids"].clone()
    return check_training(model, batch)


def rows_of_ones() -> Report:
    model = adapted()
    model.config.bos_token_id = 1
    batch = language_batch()
    batch["input_ids"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = batch["input_ids"].clone()
    return check_training(model, batch)


def begin_tokens_between_packed_texts() -> Report:
    model = adapted()
    model.config.bos_token_id = 1
    batch = language_batch()
    batch["input_ids"][:, [0, 8]] = 1
    batch["labels"] = batch["input_ids"].clone()
    return check_training(model, batch)


def packed_positions() -> Report:
    batch = language_batch()
    batch["position_ids"] = torch.arange(8).repeat(4, 2)
    del batch["attention_mask"]  # a mask of ones would let both texts see each other
    return check_training(adapted(), batch)


def decoder_inputs_shifted_right() -> Report:
    model = adapted(t5(), target_modules=["q", "v"])
    batch = language_batch()
    batch["labels"] = batch["input_ids"].flip(1)
    batch["decoder_input_ids"] = batch["labels"].roll(1, dims=1)
    batch["decoder_input_ids"][:, 0] = 0
    return check_training(model, batch)


def mask_of_minus_infinity() -> Report:
    batch = language_batch()
    batch["attention_mask"] = torch.full((4, 1, 16, 16), float("-inf")).triu(1)
    return check_training(adapted(), batch)


HEALTHY: tuple[Build, ...] = (
    packed_without_ends,
    end_token_pads_and_is_learned,
    end_token_pads_and_the_mask_hides_it,
    conversation_with_masked_turns,
    padded_decoder,
    one_repeated_token,
    shifted_for_a_loss_of_ones_own,
    regression,
    history_of_easier_data,
    loss_of_two_parts,
    numbers_without_a_point_as_targets,
    losses_of_single_rows,
    classes_learned_from_a_bad_start,
    inputs_masked_where_labels_count,
    padding_on_the_right_without_a_mask,
    classes_padded_on_the_right_of_a_causal_model,
    encoder_with_its_padding_masked,
    begin_token_that_ends_and_pads,
    two_end_tokens_close_a_text,
    rows_of_ones,
    begin_tokens_between_packed_texts,
    packed_positions,
    decoder_inputs_shifted_right,
    mask_of_minus_infinity,
)


@pytest.mark.parametrize("build", FAULTS, ids=lambda b: b.__name__)
def test_fault_is_named(build: Build) -> None:
    name_the_fault(build, *FAULTS[build])


@pytest.mark.parametrize("build", HEALTHY, ids=lambda b: b.__name__)
def test_healthy_training_is_left_alone(build: Build) -> None:
    leave_alone(build)


def test_every_known_failure_has_a_remedy() -> None:
    kinds = get_args(FailureKind)
    assert kinds
    for kind in kinds:
        assert step_raises._remedy(Failure(1, 0, "forward pass", kind, "RuntimeError", "said", 16, 8))
