"""Faults of public reports of trainings, each beside sound set-ups that look alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Adafactor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    get_linear_schedule_with_warmup,
)
from transformers.optimization import Adafactor as OldAdafactor

from pytest_lora import (
    Expect,
    Finding,
    Report,
    check_loss_decreases,
    check_model,
    check_training,
    diagnose_history,
)
from pytest_lora.bases.examples.models import language_batch, llama_config, made
from pytest_lora.inspection.training.circumstances import odd_masks

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj"]
PAD = 0


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def adapted(base: nn.Module | None = None, **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, **changes}
    model = LlamaForCausalLM(llama_config()) if base is None else base
    return get_peft_model(model, LoraConfig(**fields)).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def only(report: Report, code: str) -> Finding:
    """The one error or warning of a report."""
    (loud,) = (*report.errors, *report.warnings)
    assert loud.code == code, str(report)
    return loud


def silent(report: Report) -> None:
    assert not (*report.errors, *report.warnings), str(report)


def padded(side: str = "right") -> dict[str, Tensor]:
    """Four texts of different lengths."""
    batch = language_batch()
    for row, length in enumerate((16, 9, 6, 4)):
        rest = slice(length, 16) if side == "right" else slice(0, 16 - length)
        batch["input_ids"][row, rest], batch["attention_mask"][row, rest] = PAD, 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


# ------------------------------------------------------------------------------- texts and positions


def longer(length: int, base: nn.Module | None = None, **changes: Any) -> Report:
    base = LlamaForCausalLM(llama_config(max_position_embeddings=12, **changes)) if base is None else base
    return check_training(adapted(base), {**language_batch(length=length)})


def test_texts_beyond_the_positions_of_the_base() -> None:
    finding = only(longer(16), "LORA381")
    assert "up to 16 tokens" in finding.observed
    assert ":12]" in finding.fix


def test_texts_within_the_positions_of_the_base() -> None:
    silent(longer(12))
    rescaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    if not hasattr(llama_config(), "rope_parameters"):
        rescaled = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    silent(longer(16, **rescaled))


def test_padding_and_packed_documents_take_no_positions() -> None:
    model = adapted(LlamaForCausalLM(llama_config(max_position_embeddings=12)))
    batch = language_batch()
    batch["input_ids"][:, 12:], batch["attention_mask"][:, 12:] = PAD, 0
    batch["labels"][:, 12:] = -100
    silent(check_training(model, batch))
    packed = language_batch()
    del packed["attention_mask"]
    packed["position_ids"] = torch.arange(8).repeat(4, 2)
    silent(check_training(model, packed))


def gemma(change: Callable[[dict[str, Tensor]], None] = lambda _: None, **fields: Any) -> Report:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    config = GemmaConfig(vocab_size=128, intermediate_size=128, num_hidden_layers=1, **sizes, **fields)
    batch = language_batch(rows=2)
    change(batch)
    return check_training(adapted(GemmaForCausalLM(config)), batch)


def test_texts_of_gemma_without_a_begin_token() -> None:
    assert "begin token 2" in only(gemma(), "LORA382").observed


def begun(row: int, place: int) -> Callable[[dict[str, Tensor]], None]:
    def change(batch: dict[str, Tensor]) -> None:
        batch["input_ids"][row, place] = batch["labels"][row, place] = 2

    return change


def test_texts_that_need_no_further_begin_token() -> None:
    silent(gemma(begun(0, 0)))
    silent(gemma(begun(1, 7)))  # one document goes on where the row before broke off, and another begins
    silent(gemma(bos_token_id=None))
    silent(check_training(adapted(), language_batch()))  # Llama does without


def test_an_end_of_their_own_is_told_and_no_alarm() -> None:
    model = adapted()
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    batch = language_batch()
    batch["input_ids"][:, -1] = batch["labels"][:, -1] = 9
    batch["labels"][:, :4] = -100

    def infos() -> list[str]:
        report = check_training(model, batch, expect=Expect(completion_only=True))
        silent(report)
        return [f.observed for f in report.findings if f.code == "LORA374"]

    assert "end with token 9" in infos()[0]
    model.generation_config.eos_token_id = [2, 9]
    assert not infos()


# ------------------------------------------------------------------------------- what raises


def test_inputs_of_another_length_are_named() -> None:
    batch = language_batch()
    batch["position_ids"] = torch.arange(13).repeat(4, 1)
    finding = only(check_training(adapted(), batch), "LORA319")
    assert "position_ids of shape [4, 13] beside input_ids of [4, 16]" in finding.fix
    batch["position_ids"] = torch.arange(16).repeat(4, 1)
    silent(check_training(adapted(), batch))


def test_a_model_without_a_head_is_told_to_need_one() -> None:
    batch = language_batch()
    report = check_training(adapted(LlamaModel(llama_config())), batch)
    finding = only(report, "LORA319")
    assert "LlamaModel: it gives no loss" in finding.observed
    assert "AutoModelForCausalLM" in finding.fix
    silent(check_training(adapted(), batch))
    with pytest.raises(ValueError, match="load the model with a head"):
        check_loss_decreases(adapted(LlamaModel(llama_config())), batch)


def test_padded_labels_of_two_models_put_together() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    fields: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, **sizes}
    decoder = BertLMHeadModel(BertConfig(**fields, is_decoder=True, add_cross_attention=True))
    base: Any = EncoderDecoderModel(encoder=BertModel(BertConfig(**fields)), decoder=decoder)
    base.config.decoder_start_token_id, base.config.pad_token_id = 101, 0
    model = adapted(base, target_modules=["query"], task_type="SEQ_2_SEQ_LM")
    batch = language_batch()
    batch["labels"][:, 0] = 101  # [CLS], as in the tutorials
    batch["labels"][:, 9:] = PAD
    told = only(check_training(model, batch), "LORA321")
    assert "attention_mask of the tokenized labels" in told.fix
    batch["labels"][:, 9:] = -100
    silent(check_training(model, batch))


# ------------------------------------------------------------------------------- losses


def policy(model: Any, batch: Any) -> Tensor:
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    logits = model(ids, batch["attention_mask"]).logits[:, :-1]
    kept = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    ratio = (kept - kept.detach()).exp()
    return -(ratio * batch["advantages"][:, None] * mask).sum() / mask.sum().clamp(min=1)


def rewarded(advantages: list[float], counted: int = 8) -> Report:
    batch = language_batch()
    del batch["labels"]
    batch["completion_mask"] = torch.zeros(4, 16)
    batch["completion_mask"][:, 16 - counted :] = 1 if counted else 0
    batch["advantages"] = torch.tensor(advantages)
    return check_training(adapted(), batch, loss_fn=policy)


def test_what_makes_a_loss_of_zero_is_named() -> None:
    equal = only(rewarded([0.0] * 4), "LORA311")
    assert equal.observed.endswith("advantages is 0 throughout")
    assert "rewards" in equal.fix
    cut = only(rewarded([1.0, -1.0, 0.5, -0.5], counted=0), "LORA311")
    assert cut.observed.endswith("completion_mask is 0 throughout")
    assert "cut off" in cut.fix


def test_a_policy_loss_that_begins_at_zero_is_no_fault() -> None:
    silent(rewarded([1.0, -1.0, 0.5, -0.5]))
    silent(rewarded([1.0, 0.0, 0.0, -1.0]))  # one question whose answers are all alike


def in_batch_negatives(rows: int) -> Report:
    def loss(model: Any, batch: Any) -> Tensor:
        states = model(batch["input_ids"], output_hidden_states=True).hidden_states[-1]
        pooled = nn.functional.normalize(states.mean(1), dim=-1)
        return nn.functional.cross_entropy(20 * pooled @ pooled.detach().flip(0).T, torch.arange(rows))

    batch = language_batch(rows)
    del batch["labels"]
    return check_training(adapted(), batch, loss_fn=loss)


def test_a_comparison_with_nobody() -> None:
    assert "two rows at least" in only(in_batch_negatives(1), "LORA311").fix
    silent(in_batch_negatives(2))


Read = Callable[[Tensor, Tensor], Tensor]


def at_the_end(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, -1]


def at_the_last_token(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states)), mask.sum(1) - 1]


def of_all_positions(states: Tensor, mask: Tensor) -> Tensor:
    return states.mean(1)


def of_the_text(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def embedded(
    read: Read, side: str = "right", base: nn.Module | None = None, filler: int = PAD, **given: Any
) -> Report:
    """An embedding model: texts are to lie near to those of the next row."""

    def loss(model: Any, batch: Any) -> Tensor:
        states = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        pooled = nn.functional.normalize(read(states, batch["attention_mask"]), dim=-1)
        return nn.functional.cross_entropy(5 * pooled @ pooled.roll(1, 0).T, torch.arange(4))

    batch = padded(side)
    del batch["labels"]
    batch["input_ids"][batch["attention_mask"] == 0] = filler
    base = LlamaModel(llama_config(pad_token_id=PAD)) if base is None else base
    return check_training(adapted(base), batch, loss_fn=loss, **given)


@pytest.mark.parametrize("read", [at_the_end, of_all_positions])
def test_a_loss_that_reads_the_padding(read: Read) -> None:
    finding = only(embedded(read), "LORA386")
    assert "3 padded rows" in finding.where
    assert "% of the gradient" in finding.observed


@pytest.mark.parametrize(
    "sound",
    [
        lambda: embedded(at_the_last_token),
        lambda: embedded(of_the_text),
        lambda: embedded(at_the_end, "left"),
        lambda: embedded(of_the_text, "left"),
        # ColBERT fills its queries with a token that it does not attend to and reads all the same.
        lambda: embedded(of_all_positions, filler=99),
    ],
    ids=["last token", "mean of the text", "left", "mean on the left", "filled on purpose"],
)
def test_a_loss_that_reads_texts(sound: Callable[[], Report]) -> None:
    silent(sound())


def test_padding_is_not_asked_where_a_graph_hangs_on_it() -> None:
    base = LlamaModel(llama_config(pad_token_id=PAD))
    base.gradient_checkpointing_enable()
    assert "LORA386" not in {f.code for f in embedded(at_the_end, base=base).findings}
    assert "LORA386" not in {f.code for f in embedded(at_the_end, steps=1).findings}


def test_a_model_may_add_to_what_it_embedded_in_place() -> None:
    class Scaled(LlamaModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **given: Any) -> Any:
            embedded_tokens = self.embed_tokens(input_ids)
            embedded_tokens.mul_(2.0)
            return super().forward(inputs_embeds=embedded_tokens, attention_mask=attention_mask, **given)

    only(embedded(at_the_end, base=Scaled(llama_config(pad_token_id=PAD))), "LORA386")
    silent(embedded(at_the_last_token, base=Scaled(llama_config(pad_token_id=PAD))))


def test_asking_for_padding_takes_no_pass_more() -> None:
    calls = 0

    def loss(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, -1].pow(2).mean()

    batch = padded()
    model = adapted(LlamaModel(llama_config(pad_token_id=PAD)))
    passes: list[bool] = []
    model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    report = check_training(model, batch, loss_fn=loss, steps=3)
    assert "LORA386" in {f.code for f in report.findings}
    assert (calls, passes) == (3, [True] * 3)
    embeddings = model.get_input_embeddings()
    assert not embeddings._forward_hooks
    assert not embeddings(batch["input_ids"]).requires_grad


# ------------------------------------------------------------------------------- rates


def stepped(optimizer: Callable[[list[nn.Parameter]], Any], run: int | None = None) -> Report:
    model = adapted()
    made_one = optimizer(trained(model))
    schedule = None if run is None else get_linear_schedule_with_warmup(made_one, 0, run)
    return check_training(model, language_batch(), optimizer=made_one, scheduler=schedule)


def old(lr: float, *, scaled: bool) -> Callable[[list[nn.Parameter]], Any]:
    return lambda p: OldAdafactor(p, lr=lr, scale_parameter=scaled, relative_step=False, warmup_init=False)


def test_an_adafactor_that_scales_by_a_zero_factor() -> None:
    finding = only(stepped(old(2e-4, scaled=True)), "LORA305")
    assert "counts as 0.001" in finding.observed
    assert "5,000 steps pass" in finding.observed
    assert "scale_parameter=False" in finding.fix
    only(stepped(lambda p: Adafactor(p, lr=2e-4)), "LORA305")


def test_an_adafactor_that_moves_the_adapter() -> None:
    silent(stepped(old(2e-4, scaled=False)))
    silent(stepped(lambda p: Adafactor(p)))  # torch's own rate
    silent(stepped(old(1e-3, scaled=True), run=100_000))  # a thousand steps of so many
    only(stepped(old(1e-3, scaled=True)), "LORA305")


def curve(rates: list[float]) -> Report:
    peak, losses, loss = max(rates), [], 2.5
    for i, rate in enumerate(rates):
        loss -= 0.03 * (loss - 0.8) * rate / peak
        losses.append(loss + (37 * i * i % 101) / 1000)
    return diagnose_history(losses, learning_rate=rates)


def test_a_schedule_that_ends_before_the_run() -> None:
    finding = only(curve([2e-4 * max(0.0, 1 - i / 100) for i in range(200)]), "LORA383")
    assert "0 since step 100, for 100 steps, 50%" in finding.observed


@pytest.mark.parametrize(
    "rates",
    [
        [2e-4 * (1 - i / 200) for i in range(201)],
        [2e-4 * max(0.0, 1 - i / 190) for i in range(200)],  # a line to zero, a little early
        [2e-4 * max(1e-3, 1 - i / 100) for i in range(200)],  # down to a least rate, on purpose
        [2e-4 * (i >= 30) for i in range(200)],  # one that begins late
        [2e-4 * max(0.0, 1 - i / 975) for i in range(1000)],  # the last few of many
    ],
    ids=["to the end", "a little early", "least rate", "late", "last few"],
)
def test_a_schedule_that_ends_with_the_run(rates: list[float]) -> None:
    assert "LORA383" not in {f.code for f in curve(rates).findings}


def test_a_rate_that_never_arrives_is_advised_and_no_rank() -> None:
    def fix(rate: float) -> str:
        losses = [2.5 + (37 * i * i % 101) / 1000 for i in range(200)]
        report = diagnose_history(losses, learning_rate=[rate] * 200)
        return only(report, "LORA344").fix

    assert "5e-08 at most" in fix(5e-8)
    assert "rank" not in fix(5e-8)
    assert "double the rank" in fix(2e-7)


# ------------------------------------------------------------------------------- adapters


def test_magnitudes_that_never_train() -> None:
    model = adapted(use_dora=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name or "lora_B" in name)
    report = check_model(model)
    silent(report)
    (told,) = (f for f in report.findings if f.code == "LORA209")
    assert "lora_magnitude_vector" in told.observed
    model.set_adapter("default")
    assert "LORA209" not in {f.code for f in check_model(model).findings}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name or "magnitude" in name)
    silent(check_model(model))  # DoRA with a frozen lora_A


@pytest.mark.parametrize("purpose", ["eval", "inference"])
def test_an_adapter_that_is_merged_in_part(purpose: Any) -> None:
    model = adapted().eval()
    meant = Expect(purpose=purpose)
    silent(check_model(model, expect=meant))
    model.merge_adapter()
    silent(check_model(model, expect=meant))
    model.base_model.model.model.layers[0].self_attn.q_proj.unmerge()
    told = only(check_model(model, expect=meant), "LORA203")
    assert (told.severity, "of 3 of its 4 modules" in told.observed) == ("warning", True)
    model.unmerge_adapter()
    silent(check_model(model, expect=meant))


def test_a_merged_adapter_beside_one_on_other_modules() -> None:
    model = adapted().eval()
    model.add_adapter("other", LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["default"])
    silent(check_model(model, expect=Expect(purpose="inference")))


def _by_decay(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups with and without decay; the table that has the hook is in the one without, the head in the other."""
    hooked = [bool(p._backward_hooks) for p in params]
    rest = [p for p, held in zip(params, hooked, strict=True) if not held]
    return [{"params": rest}, {"params": [params[hooked.index(True)]], "weight_decay": 0.0}]


def held(optimizer: Callable[..., Any], decay: float, *, kept: int = 1, rate: float = 1e-3) -> Report:
    """A training of an embedding of which a hook holds all rows but the first ones of the batch."""
    model = adapted(modules_to_save=["embed_tokens", "lm_head"])
    batch = language_batch()
    table = model.get_input_embeddings().weight
    new = torch.zeros(len(table), 1)
    new[batch["input_ids"].unique()[:kept]] = 1
    table.register_hook(lambda gradient: gradient * new)
    return check_training(model, batch, optimizer=optimizer(trained(model), lr=rate, weight_decay=decay))


def test_rows_that_a_hook_holds_and_the_decay_moves() -> None:
    told = only(held(torch.optim.AdamW, 0.1), "LORA391")
    assert told.where.endswith("embed_tokens.modules_to_save.default.weight")
    assert "weight_decay=0.1 moves each of their rows by 0.0001 of itself" in told.observed
    assert "by a step of its own" in only(held(torch.optim.Adam, 1e-6), "LORA391").observed
    silent(held(torch.optim.AdamW, 0.0))
    silent(held(torch.optim.AdamW, 0.1, kept=1000))  # a hook that holds nothing
    apart = held(lambda params, **rest: torch.optim.AdamW(_by_decay(params), **rest), 0.1)
    assert "LORA391" not in {f.code for f in apart.findings}
    slow = held(torch.optim.AdamW, 0.01, rate=1e-4)
    silent(slow)
    assert "LORA391" in {f.code for f in slow.findings}


def test_a_copy_without_its_scaling() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    served = Expect(purpose="inference", fresh=False)
    silent(check_model(model.eval(), expect=served))
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]
    for layer in layers:
        layer.scaling["default"] = 0.0
    assert "does nothing" in only(check_model(model, expect=served), "LORA228").observed
    silent(check_model(model, expect=Expect(purpose="inference")))  # switched off by hand
    layers[0].scaling["default"] = 1.0
    silent(check_model(model, expect=served))  # other weights for some layers, as diffusers has


def from_data(init: str, change: Callable[[Any], None] = lambda _: None) -> Report:
    config = {"init_lora_weights": init} | ({"eva_config": EvaConfig()} if init == "eva" else {})
    model = adapted(**config)
    change(model)
    return check_training(model, language_batch())


def lengthened(model: Any) -> None:
    """Directions of length one, as EVA has them."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = nn.functional.normalize(parameter.data, dim=1)


def moved(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)


def test_an_initialisation_that_waits_for_a_call() -> None:
    assert "initialize_lora_eva_weights" in only(from_data("eva"), "LORA385").fix
    silent(from_data("eva", lengthened))
    silent(from_data("eva", moved))  # loaded, or trained since
    silent(from_data("orthogonal"))


def test_rows_that_are_trained_in_part_are_advised_once() -> None:
    base = made("tied_base")
    assert isinstance(base, LlamaForCausalLM)
    base.resize_token_embeddings(131)
    model = adapted(base, trainable_token_indices={"embed_tokens": [5, 128]})
    finding = only(check_model(model), "LORA248")
    assert "[5] + list(range(128, 131))" in finding.fix
    base = made("tied_base")
    assert isinstance(base, LlamaForCausalLM)
    base.resize_token_embeddings(131)
    silent(check_model(adapted(base, trainable_token_indices={"embed_tokens": [5, *range(128, 131)]})))


# ------------------------------------------------------------------------------- masks, collators, references


def masked(change: Callable[[dict[str, Tensor]], None], **given: Any) -> Report:
    batch = padded()
    change(batch)
    return check_training(adapted(), batch, **given)


def turned_round(batch: dict[str, Tensor]) -> None:
    batch["attention_mask"] = 1 - batch["attention_mask"]


def test_a_mask_that_says_the_opposite() -> None:
    report = masked(turned_round)
    (finding,) = (f for f in report.errors if f.code == "LORA321")
    assert "it says the opposite" in finding.observed
    assert finding.fix.endswith("1 - batch['attention_mask']")
    silent(masked(lambda _: None))
    hidden = masked(lambda batch: batch["attention_mask"].zero_())
    assert any("as it does all of them" in f.observed for f in hidden.errors)


def test_a_mask_that_ends_before_the_tokens() -> None:
    def cut(batch: dict[str, Tensor]) -> None:
        batch["attention_mask"] = batch["attention_mask"][:, :12]

    assert "[4, 12], input_ids of [4, 16]" in only(masked(cut, ignore=["LORA319"]), "LORA384").where
    silent(masked(cut, ignore=["LORA319"], expect=Expect(purpose="inference")))
    with_cache = {"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 6)}
    assert not list(odd_masks((with_cache,)))


def collated(left: float) -> Report:
    """What a collator for masked language models makes: a few labels, most behind the mask token, some as they were."""
    batch = language_batch(length=64)
    hidden = torch.rand(4, 64) < 0.3
    batch["labels"][~hidden] = -100
    batch["input_ids"][hidden & (torch.rand(4, 64) >= left)] = 4
    return check_training(adapted(), batch)


def test_a_collator_for_masked_language_models() -> None:
    assert "mlm=False" in only(collated(0.2), "LORA326").fix
    silent(collated(0.0))  # a diffusion language model fills in what is hidden
    silent(collated(1.0))  # labels for some tokens of a text


def test_a_header_behind_which_no_answer_comes() -> None:
    model = adapted()

    def ended(last: list[int], rows: int = 4) -> Report:
        batch = language_batch()
        batch["input_ids"][:, 3:6] = torch.tensor([5, 6, 7])
        batch["input_ids"][:rows, 13:] = torch.tensor(last)
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :6] = -100
        return check_training(model, batch)

    assert "all 4 texts" in only(ended([5, 6, 7]), "LORA389").observed
    silent(ended([9, 6, 7]))
    silent(ended([5, 6, 7], rows=3))  # answers that quote it


def scored(labels: Tensor, places: Any, **given: Any) -> Report:
    def loss(model: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch["input_ids"]).logits[:, -1][:, places], labels)

    batch = language_batch()
    del batch["labels"]
    return check_training(adapted(), batch, loss_fn=loss, **given)


def test_scores_that_are_spread_over_labels() -> None:
    finding = only(scored(torch.arange(4.0), slice(1)), "LORA388")
    assert "shape [4, 1] are compared with labels of shape [4]" in finding.observed
    silent(scored(torch.arange(4.0), 0))
    silent(scored(torch.tensor(0.5), slice(1)))  # one number for all
    silent(scored(torch.arange(4.0)[:, None], slice(3)))  # one label for three scores


def test_what_torch_says_is_still_heard(recwarn: pytest.WarningsRecorder) -> None:
    scored(torch.arange(4.0), slice(1), steps=1)
    assert any("Using a target size" in str(one.message) for one in recwarn)


def preferred(reference: Callable[[Any], Any], rate: float = 5e-6, **changes: Any) -> Report:
    def score(model: Any, ids: Tensor) -> Tensor:
        kept = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return kept.gather(-1, ids[:, 1:, None]).sum((1, 2))

    def loss(model: Any, batch: Any) -> Tensor:
        pair = batch["chosen_input_ids"], batch["rejected_input_ids"]
        gained = score(model, pair[0]) - score(model, pair[1])
        with torch.no_grad(), reference(model) as other:
            before = score(other, pair[0]) - score(other, pair[1])
        return -nn.functional.logsigmoid(0.1 * (gained - before)).mean()

    model = adapted(**changes)
    ids = language_batch()["input_ids"]
    pairs = {"chosen_input_ids": ids[:2], "rejected_input_ids": ids[2:]}
    optimizer = torch.optim.AdamW(trained(model), lr=rate)
    return check_training(model, pairs, optimizer=optimizer, loss_fn=loss)


@contextmanager
def switched_off(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model


def test_a_reference_that_is_the_policy() -> None:
    assert "ln 2 to the last digit" in only(preferred(nullcontext), "LORA387").observed
    silent(preferred(switched_off))
    silent(preferred(switched_off, rate=5e-7))
    frozen = LlamaForCausalLM(llama_config())
    silent(preferred(lambda _: nullcontext(frozen)))
    crawling = preferred(switched_off, rate=1e-12)  # ln 2 to the last digit too, and not of the reference
    assert "LORA387" not in {f.code for f in crawling.findings}


@contextmanager
def evaluated(model: Any) -> Iterator[Any]:
    with switched_off(model.eval()):
        yield model
    model.train()


def test_a_reference_with_its_dropout_on() -> None:
    def dropping(reference: Callable[[Any], Any], p: float = 0.1, **changes: Any) -> Report:
        return preferred(reference, base=LlamaForCausalLM(llama_config(attention_dropout=p)), **changes)

    told = only(dropping(switched_off), "LORA387")
    assert told.severity == "warning"
    assert told.where.endswith("self_attn")
    assert "dropout of the base gives another one at every call" in told.observed
    silent(dropping(switched_off, p=0.0))
    silent(dropping(evaluated))
    silent(dropping(switched_off, p=0.0, lora_dropout=0.1))  # which acts in the adapter alone


def test_a_reference_that_is_what_an_initialisation_left_of_the_base() -> None:
    told = only(preferred(switched_off, init_lora_weights="pissa"), "LORA372")
    assert "init_lora_weights='pissa' took its start out of the base weights" in told.observed
    silent(preferred(switched_off, init_lora_weights="gaussian"))
    frozen = LlamaForCausalLM(llama_config())
    silent(preferred(lambda _: nullcontext(frozen), init_lora_weights="pissa"))


def smoothed(shifted: int, labels: Callable[[Tensor], Tensor] = lambda ids: ids) -> Report:
    """A training by a loss of smoothed labels, which it shifts so many times."""

    def loss(model: Any, batch: Any) -> Tensor:
        logits, aims = model(batch["input_ids"]).logits, batch["labels"]
        logits, aims = logits[:, : logits.shape[1] - shifted], aims[:, shifted:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), aims.flatten(), label_smoothing=0.1)

    ids = language_batch()["input_ids"]
    return check_training(adapted(), {"input_ids": ids, "labels": labels(ids)}, loss_fn=loss)


def by_hand(ids: Tensor) -> Tensor:
    return nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


def test_smoothed_labels_that_nothing_shifts() -> None:
    told = only(smoothed(0), "LORA369")
    assert (
        "at 100% of 64 positions for the token that was just read, and at 0% for the next one"
        in told.observed
    )
    silent(smoothed(1))
    silent(smoothed(0, by_hand))


def test_a_loss_that_shifts_what_was_shifted() -> None:
    assert (
        "at 100% of 56 positions for the token after the next one"
        in only(smoothed(1, by_hand), "LORA324").observed
    )
    assert only(smoothed(2), "LORA324").where == "loss_fn"


def test_a_loss_of_a_decoder_that_shifts_its_labels() -> None:
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    model = adapted(
        T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)), target_modules=["q", "v"]
    )
    ids = torch.randint(3, 64, (4, 12))
    batch = {"input_ids": ids, "labels": ids.flip(1)}
    batch["labels"][:, 8:] = -100

    def loss(shifted: int) -> Callable[[Any, Any], Tensor]:
        def of(model: Any, batch: Any) -> Tensor:
            logits, aims = model(**batch).logits, batch["labels"]
            return nn.functional.cross_entropy(
                logits[:, : 12 - shifted].flatten(0, 1), aims[:, shifted:].flatten()
            )

        return of

    told = only(check_training(model, batch, loss_fn=loss(1)), "LORA324")
    assert "at 100% of 28 positions" in told.observed
    silent(check_training(model, batch, loss_fn=loss(0)))
    silent(check_training(model, batch))


def distilled(teacher: Callable[[Any], Any], **given: Any) -> Report:
    """A training by the distance to a teacher, of a model that has learned something before."""

    def loss(model: Any, batch: Any) -> Tensor:
        student = model(batch["input_ids"]).logits.log_softmax(-1)
        with torch.no_grad(), teacher(model) as other:
            aim = other(batch["input_ids"]).logits.log_softmax(-1)
        return nn.functional.kl_div(student, aim, log_target=True, reduction="batchmean")

    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return check_training(model, language_batch(), loss_fn=loss)


def test_a_teacher_that_is_the_student() -> None:
    assert "teacher is the model that trains" in only(distilled(nullcontext), "LORA387").observed
    silent(distilled(switched_off))
    frozen = LlamaForCausalLM(llama_config())
    silent(distilled(lambda _: nullcontext(frozen)))


def test_a_policy_beside_its_own_old_probabilities() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        def kept() -> Any:
            return (
                model(batch["input_ids"])
                .logits[:, :-1]
                .log_softmax(-1)
                .gather(-1, batch["input_ids"][:, 1:, None])
            )

        with torch.no_grad():
            before = kept()
        return -((kept() - before).exp() * batch["gain"][:, None, None]).mean()

    batch = {"input_ids": language_batch()["input_ids"], "gain": torch.tensor([1.0, -1.0, 0.5, -0.5])}
    silent(check_training(adapted(), batch, loss_fn=loss))


def test_a_mean_over_an_answer_that_was_cut_off() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        def mean(side: str) -> Any:
            ids, labels = batch[f"{side}_input_ids"], batch[f"{side}_labels"][:, 1:]
            kept = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            return (kept * (labels != -100)).sum(1) / (labels != -100).sum(1)

        return -nn.functional.logsigmoid(2 * (mean("chosen") - mean("rejected"))).mean()

    def compared(*cut: int) -> Report:
        ids = language_batch()["input_ids"]
        pairs = {f"{side}_{what}": half.clone() for side, half in zip(("chosen", "rejected"), ids.chunk(2), strict=True)
                 for what in ("input_ids", "labels")}  # fmt: skip
        pairs["rejected_labels"][list(cut)] = -100
        optimizer = torch.optim.AdamW(trained(model := adapted()), lr=5e-6)
        return check_training(model, pairs, optimizer=optimizer, loss_fn=loss)

    (told,) = compared(1).errors
    assert told.code == "LORA310"
    assert told.observed.endswith("no token that counts (chosen_labels, rejected_labels) in 1 of 2 rows")
    assert "drop rows" in told.fix
    silent(compared())


def test_labels_that_do_not_fit_into_the_frames() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (10, 4), "conv_stride": (5, 4)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    config = Wav2Vec2Config(vocab_size=32, **small, **convolutions, **positions)
    model = adapted(Wav2Vec2ForCTC(config))

    def heard(*lengths: int) -> Report:
        labels = [torch.arange(3, 3 + length) % 32 for length in lengths]
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return check_training(model, {"input_values": torch.randn(2, 800), "labels": padded})

    assert "ctc_zero_infinity" in only(heard(60, 12), "LORA310").fix
    silent(heard(12, 12))
    model.config.ctc_zero_infinity = True
    silent(heard(60, 12))
