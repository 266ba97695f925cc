"""Faults of training that rules must name, and unusual but healthy training that they must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    Adafactor,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from pytest_lora import Expect, Report, check_training
from pytest_lora.bases.examples.models import (
    BASES,
    VOCABULARY,
    WIDTH,
    classifier_batch,
    image_batch,
    language_batch,
)
from pytest_lora.facts.training import Failure, FailureKind
from pytest_lora.rules.training import step_raises

pytestmark = pytest.mark.filterwarnings("ignore")

Build = Callable[[], Report]
END = 2


def adapted(base: str | nn.Module = "base", **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    model = BASES[base]() if isinstance(base, str) else base
    return get_peft_model(model, LoraConfig(**fields)).train()


def trainable(model: nn.Module, *words: str) -> list[nn.Parameter]:
    """Trainable parameters, of whose names each has one of the words."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in named if not words or any(word in n for word in words)]


def adam(model: nn.Module, lr: float = 1e-3, **changes: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=lr, **changes)


def t5(**changes: Any) -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=128, d_kv=16, num_layers=1, num_heads=4, **changes
    )
    config.decoder_start_token_id = config.pad_token_id = 0
    return T5ForConditionalGeneration(config)


def bert_base(outputs: int = 3) -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=outputs,
    )
    return BertForSequenceClassification(config)


def bert() -> Any:
    return adapted(bert_base(), target_modules=["query", "value"], task_type="SEQ_CLS")


def with_labels(change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    batch = language_batch()
    change(batch)
    return batch


class TwoTowers(nn.Module):
    """A vision tower that runs only when there are pixels, and a language model."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH)})
        self.language_model = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH)})
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.detached = detached

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids)
        if pixels is not None:
            seen = self.vision_tower["q_proj"](pixels)
            hidden = hidden + (seen.detach() if self.detached else seen)
        logits = self.head(hidden + self.language_model["q_proj"](hidden))
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


# --- faults


def sgd_with_the_rate_of_adam() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=torch.optim.SGD(trainable(model), lr=1e-6))


def adam_with_the_rate_of_nothing() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, 1e-6), history=[4.9] * 8)


def rate_of_one() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, 1.0))


def sgd_that_diverges() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=torch.optim.SGD(trainable(model), lr=1e5))


def schedule_that_ended_early() -> Report:
    model = adapted()
    optimizer = adam(model)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 4))
    for _ in range(20):
        scheduler.step()
    flat = [4.9] * 20
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler, history=flat)


def no_rate_for_b() -> Report:
    model = adapted()
    groups = [{"params": trainable(model, "lora_A")}, {"params": trainable(model, "lora_B"), "lr": 0.0}]
    return check_training(model, language_batch(), optimizer=torch.optim.AdamW(groups, lr=1e-3))


def next_to_no_rate_for_b() -> Report:
    model = adapted()
    groups = [{"params": trainable(model, "lora_A")}, {"params": trainable(model, "lora_B"), "lr": 1e-9}]
    return check_training(model, language_batch(), optimizer=torch.optim.AdamW(groups, lr=1e-3))


def schedule_that_takes_nearly_all() -> Report:
    model = adapted()
    optimizer = adam(model, 1e-3)
    scheduler = LambdaLR(optimizer, lambda step: 1e-6)
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler)


def constant_rate_of_zero() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, 0.0))


def clipped_to_next_to_nothing() -> Report:
    return check_training(adapted(), language_batch(), max_grad_norm=1e-9)


def decay_of_a_hundred() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, weight_decay=100.0))


def reentrant_checkpointing() -> Report:
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.get_input_embeddings()._forward_hooks.clear()
    return check_training(model, language_batch())


def adapters_disabled() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "score.modules" in name)
    return check_training(model, classifier_batch())


def disabled_in_the_loss() -> Report:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        with model.disable_adapter():
            found: torch.Tensor = model(**batch).loss
            return found

    return check_training(adapted(), language_batch(), loss_fn=loss)


def merged_while_training() -> Report:
    model = adapted()
    model.merge_adapter()
    return check_training(model, language_batch())


def frozen_but_for_the_head() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    for parameter in trainable(model, "lora_"):
        parameter.requires_grad_(False)
    return check_training(model, classifier_batch())


def scaling_of_zero() -> Report:
    return check_training(adapted(lora_alpha=0), language_batch())


def tower_behind_detach() -> Report:
    model = adapted(TwoTowers(detached=True), target_modules=["q_proj"])
    return check_training(model, {**language_batch(), "pixels": torch.randn(4, 1, WIDTH)})


def tower_outside_the_forward() -> Report:
    model = adapted(TwoTowers(), target_modules=["vision_tower.q_proj"])
    return check_training(model, {**language_batch(), "pixel_values": torch.randn(4, 3)})


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


def everything_trains() -> Report:
    model = adapted()
    model.requires_grad_(True)
    return check_training(model, language_batch())


def base_was_trained_before() -> Report:
    model = adapted()
    snapshot = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    return check_training(model, language_batch(), base_snapshot=snapshot)


def head_trained_that_was_to_stay_put() -> Report:
    model = adapted()
    head = model.base_model.model.lm_head.weight.requires_grad_(True)
    return check_training(
        model, language_batch(), base_snapshot={"base_model.model.lm_head.weight": head + 0.1}
    )


def statistics_moved_before() -> Report:
    model = adapted("batchnorm_base", target_modules=["conv"]).eval()
    snapshot = {n: b.detach().clone() for n, b in model.named_buffers()}
    model.train()(**image_batch())
    return check_training(model.eval(), image_batch(), base_snapshot=snapshot)


def infinite_inputs() -> Report:
    model = adapted("batchnorm_base", target_modules=["conv"]).eval()
    batch = image_batch()
    batch["pixel_values"][0, 0, 0, 0] = float("inf")
    return check_training(model, batch)


def loss_that_divides_by_zero() -> Report:
    return check_training(adapted(), language_batch(), loss_fn=lambda m, b: m(**b).loss / 0)


def misses_the_magnitudes() -> Report:
    model = adapted(use_dora=True)
    optimizer = torch.optim.AdamW(trainable(model, "lora_A", "lora_B"), lr=1e-3)
    return check_training(model, language_batch(), optimizer=optimizer)


def misses_the_token_rows() -> Report:
    model = adapted(trainable_token_indices=[3, 4])
    optimizer = torch.optim.AdamW(trainable(model, "lora_"), lr=1e-3)
    return check_training(model, language_batch(), optimizer=optimizer)


def misses_some_layers() -> Report:
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model, "layers.0."), lr=1e-3)
    return check_training(model, language_batch(), optimizer=optimizer)


def made_before_the_adapter() -> Report:
    base = BASES["base"]()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    return check_training(adapted(base), language_batch(), optimizer=optimizer)


def half_precision_under_nadam() -> Report:
    model = adapted().half()
    return check_training(model, language_batch(), optimizer=torch.optim.NAdam(trainable(model), lr=1e-3))


def loss_of_numbers() -> Report:
    return check_training(
        adapted(), language_batch(), loss_fn=lambda m, b: torch.tensor(m(**b).loss.item(), requires_grad=True)
    )


def loss_times_zero() -> Report:
    return check_training(adapted(), language_batch(), loss_fn=lambda m, b: m(**b).loss * 0.0)


def dropout_asleep() -> Report:
    model = adapted(lora_dropout=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return check_training(model, language_batch())


def dropout_awake_for_inference() -> Report:
    return check_training(adapted(lora_dropout=0.1), language_batch(), expect=Expect(purpose="inference"))


# Losses of a run that has not learned anything yet, batch by batch.
FLAT = [4.86, 4.83, 4.87, 4.84, 4.85, 4.86, 4.84, 4.85]


def decayed_within_a_few_steps() -> Report:
    model = adapted()
    optimizer = adam(model, lr=2e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    for _ in FLAT:
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def warm_up_of_ten_thousand_steps() -> Report:
    model = adapted()
    optimizer = adam(model, lr=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10_000))
    for _ in FLAT:
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def eps_of_one() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, lr=1e-4, eps=1.0), history=FLAT)


def sgd_that_is_slow_and_flat() -> Report:
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=2e-4)
    return check_training(model, language_batch(), optimizer=optimizer, history=FLAT)


def scheduler_stepped_once_an_epoch() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, 100)
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def forgot_the_language() -> Report:
    model = adapted()
    history = [0.4, 5.2, 4.9, 4.7, 4.6]
    return check_training(model, language_batch(), optimizer=adam(model, lr=5e-2), history=history)


def exploded_so_far() -> Report:
    history = [2.1, 2.0, 2.3, 3.5, 6.1, 9.8]
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model), history=history)


def classes_summed_over_accumulation() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    batches = [classifier_batch() for _ in range(6)]
    with torch.no_grad():
        total = sum(float(model(**batch).loss) for batch in batches)
    return check_training(model, batches, history=[total, total])


def lost_in_the_rounding_of_bfloat16() -> Report:
    model = adapted().bfloat16()
    with torch.no_grad():
        for parameter in trainable(model, "lora_B"):
            parameter.fill_(0.1)
    return check_training(model, language_batch(), optimizer=adam(model, lr=1e-5))


def text_longer_than_the_positions() -> Report:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=8))
    return check_training(adapted(base, target_modules=["c_attn"]), language_batch())


def labels_longer_than_the_text() -> Report:
    return check_training(adapted(), {**language_batch(), "labels": language_batch(length=20)["labels"]})


def optimizer_of_another_rank() -> Report:
    model = adapted(r=4)
    saved = adam(model)
    model(**language_batch()).loss.backward()
    saved.step()
    model = adapted(r=8)
    optimizer = adam(model)
    optimizer.load_state_dict(saved.state_dict())
    return check_training(model, language_batch(), optimizer=optimizer)


def weights_of_two_dtypes() -> Report:
    model = adapted()
    model.get_base_model().lm_head.bfloat16()
    return check_training(model, language_batch())


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


def trainable_adapter_not_active() -> Report:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    return check_training(model, language_batch())


FAULTS: dict[Build, tuple[str, str]] = {
    sgd_with_the_rate_of_adam: ("LORA305", "1e-06"),
    adam_with_the_rate_of_nothing: ("LORA305", "hardly moves"),
    rate_of_one: ("LORA304", "learning rate of 1"),
    sgd_that_diverges: ("LORA304", "its own size"),
    schedule_that_ended_early: ("LORA303", "zero from step 4 on"),
    no_rate_for_b: ("LORA303", "lora_B is 0"),
    next_to_no_rate_for_b: ("LORA305", "1e-09 of lora_B"),
    schedule_that_takes_nearly_all: ("LORA305", "a learning rate of 1e-09"),
    constant_rate_of_zero: ("LORA303", "learning rate is 0"),
    clipped_to_next_to_nothing: ("LORA307", "clipped to 1e-09"),
    decay_of_a_hundred: ("LORA306", "weight_decay=100"),
    reentrant_checkpointing: ("LORA313", "reentrant gradient checkpointing"),
    adapters_disabled: ("LORA313", "disabled"),
    disabled_in_the_loss: ("LORA312", "no graph"),
    merged_while_training: ("LORA313", "merged"),
    frozen_but_for_the_head: ("LORA313", "frozen"),
    scaling_of_zero: ("LORA313", "scaling is 0"),
    tower_behind_detach: ("LORA314", "vision_tower"),
    tower_outside_the_forward: ("LORA313", "outside the forward pass"),
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
    everything_trains: ("LORA330", "requires_grad=True"),
    base_was_trained_before: ("LORA330", "up_proj"),
    head_trained_that_was_to_stay_put: ("LORA330", "lm_head"),
    statistics_moved_before: ("LORA331", "running statistics"),
    infinite_inputs: ("LORA310", "step 1"),
    loss_that_divides_by_zero: ("LORA310", "inf"),
    misses_the_magnitudes: ("LORA301", "magnitudes"),
    misses_the_token_rows: ("LORA301", "embedding rows"),
    misses_some_layers: ("LORA301", "misses lora_B"),
    made_before_the_adapter: ("LORA301", "frozen base weights"),
    half_precision_under_nadam: ("LORA309", "float16"),
    loss_of_numbers: ("LORA313", "no gradient"),
    loss_times_zero: ("LORA311", "exactly 0"),
    dropout_asleep: ("LORA332", "eval mode"),
    dropout_awake_for_inference: ("LORA333", "inference"),
    decayed_within_a_few_steps: ("LORA305", "decay"),
    warm_up_of_ten_thousand_steps: ("LORA305", "warm-up"),
    eps_of_one: ("LORA305", "eps=1 outweighs"),
    sgd_that_is_slow_and_flat: ("LORA305", "0.0002"),
    scheduler_stepped_once_an_epoch: ("LORA303", "not stepped"),
    forgot_the_language: ("LORA304", "diverged"),
    exploded_so_far: ("LORA304", "rose from 2.1 to 9.8"),
    classes_summed_over_accumulation: ("LORA325", "sum over 6 accumulation steps"),
    lost_in_the_rounding_of_bfloat16: ("LORA315", "bfloat16"),
    text_longer_than_the_positions: ("LORA319", "16 tokens long, and the model has 8 positions"),
    labels_longer_than_the_text: ("LORA319", "the length of input_ids"),
    optimizer_of_another_rank: ("LORA319", "another rank"),
    weights_of_two_dtypes: ("LORA319", "one dtype"),
    question_as_input_answer_as_labels: ("LORA326", "another text"),
    padding_on_the_left_without_a_mask: ("LORA327", "3 of 4 rows"),
    unmasked_padding_of_an_encoder: ("LORA327", "on the right"),
    text_begins_twice_behind_padding: ("LORA328", "4 of 4 rows"),
    end_tokens_pad_without_a_mask: ("LORA321", "eos_token_id"),
    nan_in_a_later_batch: ("LORA310", "batch 4: pixel_values"),
    trainable_adapter_not_active: ("LORA313", "'second' is not active"),
}

# --- healthy


def warm_up_has_just_begun() -> Report:
    model = adapted()
    optimizer = adam(model, lr=1e-5)
    schedule = get_linear_schedule_with_warmup(optimizer, 500, 10_000)
    for _ in FLAT:
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def warm_up_of_a_very_long_run_has_just_begun() -> Report:
    model = adapted()
    optimizer = adam(model, lr=2e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2_000, 100_000)
    for _ in FLAT:
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def decayed_after_the_loss_fell() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    model(**language_batch()).loss.backward()
    for _ in range(10):
        optimizer.step()
        schedule.step()
    history = [4.8 - 0.2 * i for i in range(10)]
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=history)


def recipe_tried_out_for_three_steps() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, 3)
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)


def schedule_at_its_last_step() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
    for _ in range(9):
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)


def schedule_that_asks_for_the_loss() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)


def schedule_of_schedules() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedules = torch.optim.lr_scheduler
    schedule = schedules.SequentialLR(
        optimizer,
        [schedules.LinearLR(optimizer, 0.01, 1.0, 5), schedules.CosineAnnealingLR(optimizer, 20)],
        [5],
    )
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)


def eps_for_half_precision() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, eps=1e-5), history=FLAT)


def end_of_a_cosine() -> Report:
    model = adapted()
    optimizer = adam(model, lr=1e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 20)
    model(**language_batch()).loss.backward()
    for _ in range(17):
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def numbers_without_a_point_as_targets() -> Report:
    model = adapted(bert_base(outputs=1), target_modules=["query", "value"], task_type="SEQ_CLS")
    return check_training(model, {**language_batch(), "labels": torch.tensor([-2, 0, 5, 3])})


def losses_of_single_rows() -> Report:
    history = [0.6, 1.9, 2.1, 2.0, 1.8]
    return check_training(adapted(), language_batch(), history=history)


def classes_learned_from_a_bad_start() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    return check_training(model, [classifier_batch() for _ in range(4)], history=[4.9, 4.1, 3.2, 2.6])


def inputs_with_noise() -> Report:
    batch = language_batch()
    noise = torch.rand(batch["input_ids"].shape) < 0.5
    batch["input_ids"] = batch["input_ids"].masked_fill(noise, 7)
    return check_training(adapted(), batch)


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


def fresh_encoder_decoder_without_tied_embeddings() -> Report:
    base = t5(tie_word_embeddings=False)
    with torch.no_grad():
        base.get_output_embeddings().weight.normal_(std=5.0)
    batch = language_batch()
    batch = {**batch, "labels": batch["input_ids"]}
    return check_training(
        adapted(base, target_modules=["q", "v"]), batch, loss_fn=lambda model, batch: model(**batch).loss
    )


def saved_embedding_that_a_head_is_tied_to() -> Report:
    tying = {"ensure_weight_tying": True} if "ensure_weight_tying" in LoraConfig.__dataclass_fields__ else {}
    model = adapted("tied_base", modules_to_save=["embed_tokens"], **tying)
    return check_training(model, language_batch())


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


def resumed_in_bfloat16() -> Report:
    model = adapted().bfloat16()
    with torch.no_grad():
        for parameter in trainable(model, "lora_B"):
            parameter.normal_(std=0.02)
    return check_training(model, language_batch(), optimizer=adam(model, lr=2e-4))


def frozen_a() -> Report:
    model = adapted()
    for parameter in trainable(model, "lora_A"):
        parameter.requires_grad_(False)
    return check_training(model, language_batch(), optimizer=adam(model))


def optimizer_of_b_alone() -> Report:
    model = adapted()
    return check_training(
        model, language_batch(), optimizer=torch.optim.AdamW(trainable(model, "lora_B"), lr=1e-3)
    )


def lora_plus() -> Report:
    model = adapted()
    groups = [
        {"params": trainable(model, "lora_A"), "lr": 2e-4},
        {"params": trainable(model, "lora_B"), "lr": 2e-4 * 16},
    ]
    return check_training(model, language_batch(), optimizer=torch.optim.AdamW(groups, weight_decay=0.0))


def warm_up() -> Report:
    model = adapted()
    optimizer = adam(model)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / 100))
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler)


def finished_linear_schedule() -> Report:
    model = adapted()
    optimizer = adam(model)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 8))
    for _ in range(8):
        scheduler.step()
    falling = [4.9 - 0.1 * i for i in range(8)]
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler, history=falling)


def rate_made_by_the_schedule() -> Report:
    model = adapted()
    optimizer = adam(model, 1.0)
    scheduler = LambdaLR(optimizer, lambda step: 1e-3 * min((step + 1) ** -0.5, (step + 1) / 1000))
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler)


def reference_adapter_frozen() -> Report:
    model = adapted()
    model.add_adapter("reference", LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("default")
    return check_training(model, language_batch())


def stacked_on_a_frozen_adapter() -> Report:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "second"])
    for parameter in trainable(model, "default"):
        parameter.requires_grad_(False)
    return check_training(model, language_batch())


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


def bfloat16_adapter() -> Report:
    model = adapted().to(torch.bfloat16)
    return check_training(model, language_batch(), optimizer=adam(model, 2e-4))


def scaler_with_float32_weights() -> Report:
    model = adapted()
    return check_training(
        model, language_batch(), optimizer=adam(model), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16)
    )


def scaler_that_is_off() -> Report:
    model = adapted().to(torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return check_training(model, language_batch(), optimizer=adam(model), scaler=scaler)


def sgd_with_momentum() -> Report:
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    return check_training(model, language_batch(), optimizer=optimizer)


def adafactor_with_its_own_rate() -> Report:
    model = adapted()
    optimizer = Adafactor(trainable(model), lr=None, relative_step=True, warmup_init=True)
    return check_training(model, language_batch(), optimizer=optimizer)


def preference_tuning_rate() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, 5e-7))


def dora() -> Report:
    model = adapted(use_dora=True, use_rslora=True, r=32)
    return check_training(model, language_batch(), optimizer=adam(model))


def token_rows_and_biases() -> Report:
    model = adapted("gpt2_base", target_modules=["c_attn"], bias="all")
    return check_training(model, language_batch(), optimizer=adam(model))


def four_bit() -> Report:
    model = adapted("base_4bit", target_modules="all-linear", lora_dropout=0.05)
    return check_training(model, language_batch(), optimizer=adam(model, 2e-4))


def norms_train_too() -> Report:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return check_training(model, language_batch(), optimizer=adam(model))


def pissa_with_a_snapshot_of_the_original() -> Report:
    base = BASES["base"]()
    snapshot = {n: p.detach().clone() for n, p in base.named_parameters()}
    return check_training(adapted(base, init_lora_weights="pissa"), language_batch(), base_snapshot=snapshot)


def merged_and_unmerged_before() -> Report:
    model = adapted(init_lora_weights=False)
    snapshot = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    model.merge_adapter()
    model.unmerge_adapter()
    return check_training(model, language_batch(), base_snapshot=snapshot)


def two_models_in_one_optimizer() -> Report:
    model, other = adapted(), nn.Linear(4, 4)
    optimizer = torch.optim.AdamW([*trainable(model), *other.parameters()], lr=1e-3)
    return check_training(model, language_batch(), optimizer=optimizer)


def policy_gradient_from_zero() -> Report:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        found: torch.Tensor = model(**batch).loss
        return found - found.detach()

    # The history of such a run is zero in all its four decimals.
    return check_training(adapted(), language_batch(), loss_fn=loss, history=[0.0] * 6)


def mixture_of_experts() -> Report:
    batch = language_batch(1, 4)
    return check_training(adapted("moe_base", target_modules="all-linear"), batch)


def evaluation() -> Report:
    model = adapted(lora_dropout=0.3).eval()
    return check_training(model, language_batch(), expect=Expect(purpose="eval"))


def regression() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    model.config.problem_type = "multi_label_classification"
    batch = {**classifier_batch(), "labels": torch.rand(8, 3)}
    return check_training(model, batch)


def history_of_easier_data() -> Report:
    return check_training(adapted(), [language_batch()] * 4, history=[2.5, 2.2, 2.0, 1.9])


def loss_of_two_parts() -> Report:
    return check_training(adapted(), language_batch(), loss_fn=lambda m, b: 2 * m(**b).loss)


HEALTHY: tuple[Build, ...] = (
    frozen_a,
    optimizer_of_b_alone,
    lora_plus,
    warm_up,
    finished_linear_schedule,
    rate_made_by_the_schedule,
    reference_adapter_frozen,
    stacked_on_a_frozen_adapter,
    packed_without_ends,
    end_token_pads_and_is_learned,
    end_token_pads_and_the_mask_hides_it,
    conversation_with_masked_turns,
    padded_decoder,
    one_repeated_token,
    shifted_for_a_loss_of_ones_own,
    bfloat16_adapter,
    scaler_with_float32_weights,
    scaler_that_is_off,
    sgd_with_momentum,
    adafactor_with_its_own_rate,
    preference_tuning_rate,
    dora,
    token_rows_and_biases,
    four_bit,
    norms_train_too,
    pissa_with_a_snapshot_of_the_original,
    merged_and_unmerged_before,
    two_models_in_one_optimizer,
    policy_gradient_from_zero,
    mixture_of_experts,
    evaluation,
    regression,
    history_of_easier_data,
    loss_of_two_parts,
    warm_up_has_just_begun,
    warm_up_of_a_very_long_run_has_just_begun,
    decayed_after_the_loss_fell,
    recipe_tried_out_for_three_steps,
    schedule_at_its_last_step,
    schedule_that_asks_for_the_loss,
    schedule_of_schedules,
    eps_for_half_precision,
    end_of_a_cosine,
    numbers_without_a_point_as_targets,
    losses_of_single_rows,
    classes_learned_from_a_bad_start,
    inputs_with_noise,
    inputs_masked_where_labels_count,
    padding_on_the_right_without_a_mask,
    classes_padded_on_the_right_of_a_causal_model,
    encoder_with_its_padding_masked,
    begin_token_that_ends_and_pads,
    two_end_tokens_close_a_text,
    fresh_encoder_decoder_without_tied_embeddings,
    saved_embedding_that_a_head_is_tied_to,
    rows_of_ones,
    begin_tokens_between_packed_texts,
    packed_positions,
    decoder_inputs_shifted_right,
    mask_of_minus_infinity,
    resumed_in_bfloat16,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("build", FAULTS, ids=lambda b: b.__name__)
def test_fault_is_named(build: Build) -> None:
    code, words = FAULTS[build]
    report = build()
    # From LORA340 on rules are about the history alone; a flat one that is given is named as well.
    loud = [f for f in (*report.errors, *report.warnings) if f.code < "LORA340"]
    assert {f.code for f in loud} == {code}, str(report)
    assert any(words in str(f) for f in loud), str(report)


@pytest.mark.parametrize("build", HEALTHY, ids=lambda b: b.__name__)
def test_healthy_training_is_left_alone(build: Build) -> None:
    report = build()
    assert not (*report.errors, *report.warnings), str(report)


def test_every_known_failure_has_a_remedy() -> None:
    kinds = get_args(FailureKind)
    assert kinds
    for kind in kinds:
        assert step_raises._remedy(Failure(1, 0, "forward pass", kind, "RuntimeError", "said", 16, 8))
