"""The batch law: which texts are compared, what breaks it, what does not, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from pytest_lora import Expect, Finding, Report, check_training
from pytest_lora.bases.examples.models import (
    BASES,
    VOCABULARY,
    WIDTH,
    image_text_batch,
    language_batch,
    llama_config,
)
from pytest_lora.inspection.behaviour.batch_law import BatchLaw

pytestmark = pytest.mark.filterwarnings("ignore")

Batch = dict[str, Any]
LENGTHS = (16, 11, 7, 5)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def adapted(base: str | nn.Module, **changes: Any) -> Any:
    targets = ["q_proj", "v_proj", "c_attn", "query", "q"]
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": targets, **changes}
    return get_peft_model(BASES[base]() if isinstance(base, str) else base, LoraConfig(**fields)).train()


def padded(side: str = "right", filler: int = 0) -> Batch:
    """Four texts of several lengths."""
    batch = language_batch(4, 16)
    for row, length in enumerate(LENGTHS):
        pads = slice(length, None) if side == "right" else slice(None, 16 - length)
        batch["input_ids"][row, pads], batch["attention_mask"][row, pads] = filler, 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def counted(batch: Batch) -> Batch:
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def without(batch: Batch, *names: str) -> Batch:
    return {name: value for name, value in batch.items() if name not in names}


def packed(**changes: Any) -> Batch:
    """One row of three documents, of which none is to predict the next."""
    batch = language_batch(1, 24)
    positions = torch.cat([torch.arange(n) for n in (9, 8, 7)])[None]
    batch["labels"] = batch["labels"].masked_fill(positions == 0, -100)
    return {**without(batch, "attention_mask"), "position_ids": positions, **changes}


def numbered() -> Tensor:
    """The mask that numbers the documents of ``packed``."""
    return torch.tensor([[1] * 9 + [2] * 8 + [3] * 7])


def by_blocks(dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask of four dimensions that keeps the documents of ``packed`` apart."""
    document = torch.tensor([0] * 9 + [1] * 8 + [2] * 7)
    seen = (document[:, None] == document) & torch.ones(24, 24).tril().bool()
    return torch.zeros(24, 24, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def classes(batch: Batch) -> Batch:
    return {**batch, "labels": torch.tensor([0, 1, 2, 0])}


def classifier(pad: int | None) -> nn.Module:
    return LlamaForSequenceClassification(llama_config(num_labels=3, pad_token_id=pad))


def bert(**changes: Any) -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
            **changes,
        )
    )


def t5() -> nn.Module:
    config = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_ff=128, d_kv=16, num_layers=1, num_heads=4)
    config.decoder_start_token_id = config.pad_token_id = 0
    return T5ForConditionalGeneration(config)


class MeanPooling(nn.Module):
    """A classifier that takes the mean over a row, padding included or not."""

    def __init__(self, *, by_mask: bool) -> None:
        super().__init__()
        self.embed, self.q_proj = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.score, self.by_mask = nn.Linear(WIDTH, 3), by_mask

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        hidden = torch.relu(self.q_proj(self.embed(input_ids)))
        weight = attention_mask[..., None].float() if self.by_mask else torch.ones_like(hidden[..., :1])
        logits = self.score((hidden * weight).sum(1) / weight.sum(1))
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


class WithoutMask(nn.Module):
    """A language model that does not hand its mask on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bert()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


FAULTS: dict[str, tuple[Callable[[], Report], str, str]] = {
    "left padding, learned positions": (
        lambda: check_training(adapted("gpt2_base"), padded("left")),
        "shifts the positions of the text, as there are no position_ids",
        "cumsum",
    ),
    "left padding, positions that count it": (
        lambda: check_training(
            adapted("gpt2_base"), {**padded("left"), "position_ids": torch.arange(16).expand(4, 16).clone()}
        ),
        "as position_ids count it too",
        "cumsum",
    ),
    "head that pools the padding": (
        lambda: check_training(adapted(classifier(0), task_type="SEQ_CLS"), classes(padded("right", 2))),
        "padded with token 2, and the model's pad_token_id is 0",
        "model.config.pad_token_id = 2",
    ),
    "head that pools the mean": (
        lambda: check_training(adapted(MeanPooling(by_mask=False)), classes(padded())),
        "the head pools the padding",
        "attention_mask marks",
    ),
    "documents under a mask of ones": (
        lambda: check_training(adapted("base"), packed(attention_mask=torch.ones(1, 24).long())),
        "packed documents see each other",
        "leave attention_mask out",
    ),
    "documents under a causal mask of four dimensions": (
        lambda: check_training(
            adapted("base"),
            packed(attention_mask=torch.full((24, 24), torch.finfo(torch.float32).min).triu(1)[None, None]),
        ),
        "packed documents see each other",
        "leave attention_mask out",
    ),
    "documents that a mask numbers": (
        lambda: check_training(adapted("base"), without(packed(attention_mask=numbered()), "position_ids")),
        "attention_mask numbers the packed documents (1, 2, 3), which this model reads as ones",
        "give position_ids that restart at 0 in each document",
    ),
    "mask of ones over padding that the model does not know": (
        lambda: check_training(
            adapted(LlamaForCausalLM(llama_config(pad_token_id=None))),
            {**padded("left", 9), "attention_mask": torch.ones(4, 16).long()},
        ),
        "padding (token 9) is attended to, as attention_mask is 1 there",
        "hand on the attention_mask",
    ),
    "no mask over padding that the model does not know": (
        lambda: check_training(
            adapted(LlamaForCausalLM(llama_config(pad_token_id=None))),
            without(padded("left", 9), "attention_mask"),
        ),
        "as attention_mask is missing",
        "hand on the attention_mask",
    ),
    "mask that gets lost on the way": (
        lambda: check_training(adapted(WithoutMask()), padded()),
        "though attention_mask hides it",
        "without the mask",
    ),
}


def of_the_law(report: Report) -> list[Finding]:
    return [f for f in (*report.errors, *report.warnings) if f.code == "LORA360"]


@pytest.mark.parametrize("name", FAULTS)
def test_what_breaks_the_law_is_named(name: str) -> None:
    check, cause, fix = FAULTS[name]
    (finding,) = of_the_law(check())
    assert cause in finding.observed
    assert fix in finding.fix
    assert finding.severity == ("error" if "head" in name else "warning")


HEALTHY: dict[str, Callable[[], Report]] = {
    "left padding, rotary positions": lambda: check_training(adapted("base"), padded("left")),
    "left padding, positions without it": lambda: check_training(
        adapted("gpt2_base"), counted(padded("left"))
    ),
    "right padding": lambda: check_training(adapted("gpt2_base"), padded()),
    "right padding that nothing masks": lambda: check_training(
        adapted("base"), without(padded(), "attention_mask")
    ),
    "head that knows its padding": lambda: check_training(
        adapted(classifier(2), task_type="SEQ_CLS"), classes(padded("right", 2))
    ),
    "head, padding on the left": lambda: check_training(
        adapted(classifier(2), task_type="SEQ_CLS"), classes(padded("left", 2))
    ),
    "mean over the mask": lambda: check_training(adapted(MeanPooling(by_mask=True)), classes(padded())),
    "packed documents": lambda: check_training(adapted("base"), packed()),
    "packed documents under blocks": lambda: check_training(
        adapted("base"), packed(attention_mask=by_blocks())
    ),
    "encoder": lambda: check_training(adapted(bert()), padded()),
    "encoder-decoder": lambda: check_training(adapted(t5()), padded()),
    "4 bits": lambda: check_training(adapted("base_4bit"), padded("left")),
    "bfloat16": lambda: check_training(adapted(BASES["base"]().to(torch.bfloat16)), padded("left")),
    "mixture of experts": lambda: check_training(adapted("moe_base"), padded("left")),
    "dropout": lambda: check_training(adapted("base", lora_dropout=0.1), padded("left")),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_keeps_the_law_is_left_alone(name: str) -> None:
    report = HEALTHY[name]()
    assert not of_the_law(report), str(report)


@pytest.mark.parametrize(
    ("batch", "mended"),
    [
        (lambda: padded("left"), counted),
        (lambda: padded("left"), lambda batch: padded("right")),
    ],
    ids=["positions", "padding on the right"],
)
def test_remedies_of_shifted_positions(batch: Callable[[], Batch], mended: Callable[[Batch], Batch]) -> None:
    model = adapted("gpt2_base")
    given = batch()
    assert of_the_law(check_training(model, given))
    assert not of_the_law(check_training(model, mended(given)))


def test_remedy_of_a_head_that_pools_the_padding() -> None:
    model, batch = adapted(classifier(0), task_type="SEQ_CLS"), classes(padded("right", 2))
    assert of_the_law(check_training(model, batch))
    model.config.pad_token_id = 2
    assert not check_training(model, batch).findings


class Numbered(nn.Module):
    """Keeps documents apart by a mask that numbers them, as a patched flash attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = in_a_trainer(BASES["base"]())
        self.config = self.inner.config

    def forward(self, attention_mask: Tensor, **batch: Tensor) -> Any:
        """The mask of four dimensions that the numbers stand for."""
        same = attention_mask[:, None, :, None] == attention_mask[:, None, None, :]
        seen = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        return self.inner(attention_mask=torch.zeros(same.shape).masked_fill(~seen, -1e9), **batch)


def test_a_model_that_reads_the_numbers_of_a_mask_is_left_alone() -> None:
    batch = without(packed(attention_mask=numbered()), "position_ids")
    model = adapted(Numbered())
    assert not of_the_law(check_training(model, batch))
    assert of_the_law(check_training(adapted(in_a_trainer(BASES["base"]())), batch))
    batch["attention_mask"][:, 12:] = 0  # padding behind the documents
    batch["labels"][:, 12:] = -100
    assert not of_the_law(check_training(model, batch))


def test_a_mask_that_numbers_its_documents_is_mended_by_positions() -> None:
    model, batch = adapted(in_a_trainer(BASES["base"]())), packed(attention_mask=numbered())
    assert of_the_law(check_training(model, without(batch, "position_ids")))
    assert not of_the_law(check_training(model, without(batch, "attention_mask")))


def test_remedies_of_documents_that_see_each_other() -> None:
    model, batch = adapted("base"), packed(attention_mask=torch.ones(1, 24).long())
    assert of_the_law(check_training(model, batch))
    assert not of_the_law(check_training(model, without(batch, "attention_mask")))
    assert not of_the_law(check_training(model, {**batch, "attention_mask": by_blocks()}))


# ---------------------------------------------------------------------------------------- silence


class Counting(nn.Module):
    """Notes for each call of a language model how many rows it has, and whether it trains."""

    calls: list[tuple[int, bool]]
    sizes: list[int]

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **batch: Tensor) -> Any:
        batch.pop("use_cache", None)
        Counting.calls.append((len(batch["input_ids"]), self.training))
        Counting.sizes.append(batch["input_ids"].numel())
        return self.inner(**batch)


def in_a_trainer(base: nn.Module) -> nn.Module:
    """Trainers turn the cache off."""
    found: Any = base
    found.config.use_cache = False
    return base


def calls_of(
    batches: Any, sizes: list[int] | None = None, lora_dropout: float = 0.0, **how: Any
) -> list[tuple[int, bool]]:
    Counting.calls, Counting.sizes = [], [] if sizes is None else sizes
    check_training(
        adapted(Counting(in_a_trainer(BASES["base"]())), lora_dropout=lora_dropout), batches, **how
    )
    return Counting.calls


def test_the_cache_lets_documents_see_each_other() -> None:
    base = BASES["base"]()
    (finding,) = check_training(adapted(base), packed()).findings
    assert (finding.code, finding.severity) == ("LORA360", "info")
    assert "use_cache" in finding.observed
    assert not check_training(adapted(in_a_trainer(base)), packed()).findings


@pytest.mark.parametrize(
    ("batch", "more"),
    [(language_batch(4, 16), 0), (padded("left"), 1), (padded(), 1), (packed(), 1)],
    ids=["plain", "padded on the left", "padded on the right", "documents"],
)
def test_one_forward_pass_more_at_most_and_no_backward(
    batch: Batch, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backwards: list[Any] = []
    backward = Tensor.backward
    monkeypatch.setattr(Tensor, "backward", lambda loss, **how: backwards.append(0) or backward(loss, **how))
    rows = len(batch["input_ids"])
    assert calls_of(batch) == [(rows, True)] * 3 + [(1, False)] * more
    assert len(backwards) == 3


@pytest.mark.parametrize("batch", [padded("left"), packed()], ids=["padding", "documents"])
def test_where_dropout_is_live_the_row_is_run_again_and_both_are_no_more_than_the_batch(batch: Batch) -> None:
    sizes: list[int] = []
    rows = len(batch["input_ids"])
    assert calls_of(batch, sizes, lora_dropout=0.5) == [(rows, True)] * 3 + [(1, False)] * 2
    assert sum(sizes[3:]) <= batch["input_ids"].numel()


def test_the_text_of_a_step_that_is_not_the_last() -> None:
    batches = [padded("left"), language_batch(4, 16)]
    assert calls_of(batches) == [(4, True)] * 3 + [(1, False)]
    assert calls_of(batches, steps=2) == [(4, True)] * 2 + [(1, False)] * 2


@pytest.mark.parametrize(
    ("batches", "how"),
    [
        (language_batch(), {}),
        (padded(), {"loss_fn": lambda model, batch: model(**batch).loss}),
        ({**padded(), "output_attentions": False}, {}),
    ],
    ids=["no company", "a loss of one's own", "inputs of another kind"],
)
def test_what_cannot_be_asked_costs_nothing(batches: Any, how: dict[str, Any]) -> None:
    assert not [call for call in calls_of(batches, **how) if not call[1]]


@pytest.mark.parametrize(("ranks", "asks"), [(1, True), (2, False)])
def test_a_text_is_compared_in_a_group_of_one_process_and_in_no_larger_one(
    monkeypatch: pytest.MonkeyPatch, ranks: int, asks: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    base = BASES["base"]()
    assert BatchLaw(base, base, {0: padded()}).asks is asks


def test_no_step_is_taken_for_an_evaluation() -> None:
    assert not calls_of(padded(), expect=Expect(purpose="eval"))


class Restless(nn.Module):
    """Gives something else at every call, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = BASES["base"]()

    def forward(self, **batch: Tensor) -> Any:
        found = self.inner(**batch)
        found.logits = found.logits + torch.randn_like(found.logits)
        return found


class OneRowAlone(nn.Module):
    """Does not take a batch of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = BASES["gpt2_base"]()

    def forward(self, **batch: Tensor) -> Any:
        if len(batch["input_ids"]) == 1:
            raise RuntimeError("one row")
        return self.inner(**batch)


@pytest.mark.parametrize(
    ("base", "batch"),
    [
        (Restless, lambda: padded("left")),
        (OneRowAlone, lambda: padded("left")),
        (lambda: BASES["image_text_base"](), image_text_batch),
    ],
    ids=["no two calls alike", "raises", "images"],
)
def test_silent_where_the_model_cannot_be_asked(
    base: Callable[[], nn.Module], batch: Callable[[], Batch]
) -> None:
    assert not of_the_law(check_training(adapted(base()), batch()))


def test_positions_rescaled_beyond_a_length_are_meant() -> None:
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = llama_config(max_position_embeddings=8)
    for field in ("rope_scaling", "rope_parameters"):
        if hasattr(config, field):
            setattr(config, field, rope)
    assert not of_the_law(check_training(adapted(LlamaForCausalLM(config)), padded("left")))


def test_no_trace() -> None:
    model, batch = adapted("gpt2_base"), padded("left")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {name: value.clone() for name, value in batch.items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert of_the_law(check_training(model, batch))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, given[name]) for name, value in batch.items())


class Pooler(nn.Module):
    """A head of one's own on a decoder, which makes its loss of labels that it always asks for."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.net: Any = BASES["base"]().model
        self.config = self.net.config
        self.head = nn.Linear(self.config.hidden_size, 4)
        self.counts = counts

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        places = torch.arange(1, attention_mask.shape[1] + 1)
        last = attention_mask.sum(1) - 1 if self.counts else (attention_mask * places).argmax(1)
        logits = self.head(hidden[torch.arange(len(hidden)), last])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("counts", [True, False])
def test_a_head_of_ones_own_that_counts_tokens_pools_padding_on_the_left(counts: bool) -> None:
    model = adapted(Pooler(counts))
    report = check_training(model, classes(padded("left")), select=["LORA360"])
    assert bool(report.errors) == counts, str(report)
