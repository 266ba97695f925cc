"""A base as facts, on modules of a few numbers: shapes, names, heads, and rows that were added."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from pytest_lora import count_parameters
from pytest_lora.facts.base import BaseFacts, TaskHead
from pytest_lora.facts.model import InitialRows
from pytest_lora.inspection import base_values, bitsandbytes_internals
from pytest_lora.inspection.base import base_facts, base_parameters, logical_shape, quantization_of, task_of
from pytest_lora.inspection.base_values import initial_rows
from pytest_lora.inspection.bitsandbytes_internals import keep_packing, pack_on_meta
from pytest_lora.inspection.skeleton import skeleton
from pytest_lora.inspection.survey import survey


def facts_of(model: nn.Module) -> BaseFacts:
    found = survey(model)
    return base_facts(found, base_parameters(found))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (nn.Embedding(7, 4), (7, 4)),
        (nn.Conv2d(3, 6, 2), (3, 6)),
        (nn.MultiheadAttention(4, 2), (4, 12)),
        (Conv1D(5, 3), (3, 5)),
        (nn.LayerNorm(4), None),
        (SimpleNamespace(in_features=3, out_features=5, qweight=0), (3, 5)),
        (SimpleNamespace(in_features=3, out_features=5, W_q=0), (3, 5)),
        (SimpleNamespace(in_features=3, out_features=5), None),
        (SimpleNamespace(in_features=3, out_features="5", weight=0), None),
    ],
)
def test_what_lora_can_adapt_has_a_shape(module: Any, shape: tuple[int, int] | None) -> None:
    assert logical_shape(module) == shape


@pytest.mark.parametrize(
    ("module", "method"),
    [
        (nn.Linear(2, 2), None),
        (SimpleNamespace(qweight=0), "gptq or awq"),
        (SimpleNamespace(W_q=0), "hqq"),
        (SimpleNamespace(), None),
    ],
)
def test_methods_of_quantization(module: Any, method: str | None) -> None:
    assert quantization_of(module) == method


class Packed(nn.Module):
    """A linear layer as HQQ keeps it: two numbers a byte, and what unpacks them in a dict beside the parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.W_q = nn.Parameter(torch.zeros(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.meta = {"scale": torch.ones(1), "nbits": 4}
        self.device = "cpu"

    def dequantize(self) -> torch.Tensor:
        whole = self.W_q.repeat(2, 1).reshape(self.out_features, self.in_features).to(self.device)
        made: torch.Tensor = whole * self.meta["scale"].reshape(1, 1)  # a scalar would take any device
        return made


def test_weights_that_hqq_packs_count_in_full_and_dequantize_on_a_skeleton() -> None:
    base = nn.Sequential(Packed(8, 4))
    (weight,) = base_parameters(survey(base))
    assert (weight.quantization, weight.numbers, weight.tensor.numel()) == ("hqq", 32, 16)
    assert count_parameters(base).total == 32
    copied: Any = skeleton(base).get_submodule("0")
    assert copied.dequantize().is_meta
    layer: Any = base[0]
    assert not layer.meta["scale"].is_meta
    assert layer.device == "cpu"


@pytest.mark.parametrize("inputs", [3, 64, 700])
@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_without_values_is_packed_as_bitsandbytes_packs_one(inputs: int, nested: bool) -> None:
    def made(device: str) -> Any:
        kind = {"compress_statistics": nested, "quant_type": "nf4"}
        return bitsandbytes.nn.Linear4bit(inputs, 45, device=device, **kind)

    def sizes(layer: Any) -> Any:
        state = layer.weight.quant_state
        second = state.state2 and (state.state2.absmax.shape, state.state2.blocksize)
        absmax, code = state.absmax, state.code
        return layer.weight.shape, layer.weight.dtype, absmax.shape, absmax.dtype, code.shape, second

    try:
        whole = made("cpu").to("cpu")
    except RuntimeError as error:
        pytest.skip(f"this version packs no such weight on a CPU: {error}")
    empty = made("meta")
    pack_on_meta(empty, torch.float32)
    assert sizes(empty) == sizes(whole)


def test_only_layers_of_bitsandbytes_are_told_to_keep_their_packing() -> None:
    packs, plain = nn.Linear(2, 2), nn.Linear(2, 2)
    vars(packs)["support_avx512bf16_for_cpu"] = True
    keep_packing(nn.Sequential(packs, plain))
    assert vars(packs)["support_avx512bf16_for_cpu"] is False
    assert "support_avx512bf16_for_cpu" not in vars(plain)


def test_packing_for_the_cpu_leaves_no_switch_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Linear(2, 2)
    monkeypatch.setattr(bitsandbytes_internals, "quantized_layers", lambda model: [plain])
    before = dict(vars(plain))
    bitsandbytes_internals.pack_for_cpu(plain)
    assert vars(plain) == before


@pytest.mark.parametrize(
    ("architecture", "encodes", "task"),
    [
        ("LlamaForCausalLM", False, "CAUSAL_LM"),
        ("GPT2LMHeadModel", False, "CAUSAL_LM"),
        ("BertForSequenceClassification", False, "SEQ_CLS"),
        ("BertForTokenClassification", False, "TOKEN_CLS"),
        ("BertForQuestionAnswering", False, "QUESTION_ANS"),
        ("T5ForConditionalGeneration", True, "SEQ_2_SEQ_LM"),
        ("LlavaForConditionalGeneration", False, None),
        ("BertModel", False, None),
    ],
)
def test_tasks_by_the_names_of_classes(architecture: str, encodes: bool, task: str | None) -> None:
    assert task_of(architecture, SimpleNamespace(is_encoder_decoder=encodes)) == task
    assert task_of(architecture, None) == (None if encodes else task)


def layer() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(4, 4, bias=False), "experts": nn.ModuleList([nn.Linear(4, 2)] * 1)})


class ToyForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.experts = nn.ParameterDict(
            {"up": nn.Parameter(torch.ones(2, 4, 8)), "one": nn.Parameter(torch.ones(1, 4, 8))}
        )
        self.positions = nn.Parameter(torch.ones(2, 4, 8, dtype=torch.bfloat16))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(input_ids))
        return logits

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_a_toy_in_facts() -> None:
    found = facts_of(ToyForCausalLM())
    assert (found.architecture, found.task_type) == ("ToyForCausalLM", "CAUSAL_LM")
    assert (found.input_embeddings, found.output_embeddings, found.vocab_size) == ("embed", "head", 9)
    assert found.tied == (("embed", "head"),)
    assert found.layer_indices == (0, 1, 2)
    assert found.parameters == 9 * 4 + 3 * (16 + 8 + 2) + 64 + 32 + 64
    assert found.has_biases
    assert found.float_dtypes == ("float32", "bfloat16")
    assert [(one.name, one.numbers) for one in found.fused] == [("experts.up", 64)]
    assert (found.heads, found.quantization, found.device_types) == ((), None, ("cpu",))
    assert {module.name for module in found.modules} >= {"embed", "head", "layers.2.q", "layers.0.experts.0"}
    plain = facts_of(nn.Sequential(nn.Linear(2, 2, bias=False)))
    assert (plain.has_biases, plain.input_embeddings, plain.vocab_size, plain.tied) == (False, None, None, ())


class ToyForSequenceClassification(nn.Module):
    base_model_prefix = "body"

    def __init__(self, std: float = 0.02, bias: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Linear(50, 50)
        self.score = nn.Linear(50, 100)
        self.dropout = nn.Dropout()
        nn.init.constant_(self.score.bias, bias)
        weights = torch.linspace(-1, 1, self.score.weight.numel()).reshape(self.score.weight.shape)
        self.score.weight.data = weights / weights.std() * std


@pytest.mark.parametrize(
    ("off", "bias", "fresh"),
    [
        (0.0, 0.0, True),
        (4.9, 0.0, True),
        (-4.9, 0.0, True),
        (5.1, 0.0, False),
        (-5.1, 0.0, False),
        (0.0, 1e-6, False),
    ],
)
def test_a_head_is_fresh_within_five_deviations_of_its_deviation(
    off: float, bias: float, fresh: bool
) -> None:
    std = 0.02 * (1 + off / math.sqrt(2 * 5000))
    (head,) = facts_of(ToyForSequenceClassification(std, bias)).heads
    assert (head.name, head.fresh) == ("score", fresh)
    (unknown,) = facts_of(ToyForSequenceClassification(std, bias).to("meta")).heads
    assert unknown.fresh is None


class ToyWithValueHead(nn.Module):
    def __init__(self, dtype: torch.dtype, beyond: float) -> None:
        super().__init__()
        self.body, self.v_head = nn.Linear(9, 9), nn.Linear(9, 1)
        bound = 1 / math.sqrt(9)
        weight = torch.linspace(-bound, bound, 9)[None]
        self.v_head.weight.data = weight.to(dtype)
        self.v_head.weight.data[0, 0] *= beyond


@pytest.mark.parametrize(
    ("dtype", "beyond", "fresh"),
    [
        (torch.float32, 1.0, True),
        (torch.bfloat16, 1.0, True),  # 1/3 is rounded up there
        (torch.float32, 1.001, False),
        (torch.bfloat16, 1.02, False),
    ],
)
def test_a_head_of_ones_own_is_fresh_within_the_bound_of_torch(
    dtype: torch.dtype, beyond: float, fresh: bool
) -> None:
    assert facts_of(ToyWithValueHead(dtype, beyond)).heads == (TaskHead("v_head", fresh),)


@pytest.mark.parametrize(("size", "fresh"), [(1.0, True), (0.9, True), (0.8, False), (0.0, False)])
def test_a_head_of_ones_own_has_the_deviation_that_torch_draws(size: float, fresh: bool) -> None:
    """Of 4,096 numbers it is off by at most five 64ths of the bound, an eighth of itself."""
    model = ToyWithValueHead(torch.float32, 1.0)
    model.v_head = nn.Linear(4096, 1)
    model.v_head.weight.data = torch.linspace(-size / 64, size / 64, 4096)[None]
    assert facts_of(model).heads == (TaskHead("v_head", fresh),)


def test_a_value_head_that_is_set_to_train_by_hand_is_known_to_its_user() -> None:
    model = ToyWithValueHead(torch.float32, 1.0)
    model.body.requires_grad_(False)
    assert facts_of(model).heads == ()
    model.v_head.requires_grad_(False)
    assert facts_of(model).heads == (TaskHead("v_head", True),)


@pytest.mark.parametrize(
    ("names", "takes"),
    [
        ("input_ids", True),
        ("input_ids, pixel_values", True),
        ("x", True),
        ("pixel_values", False),
        ("inputs", False),
        ("input_values, **others", True),
    ],
)
def test_what_a_forward_takes(names: str, takes: bool) -> None:
    made: dict[str, Any] = {"nn": nn}
    exec(f"class Model(nn.Module):\n    def forward(self, {names}): ...", made)
    assert facts_of(made["Model"]()).takes_input_ids is takes


def classifier(kind: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=96, d_model=32, **sizes)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def small_t5(**fields: Any) -> Any:
    return classifier("T5", d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **fields)


def small_bart(**fields: Any) -> Any:
    each = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in each.items()}
    return classifier("Bart", **sizes, **fields)


def change_a_bias(model: Any) -> None:
    model.classification_head.dense.bias.data[0] = 1e-4


def scale_a_weight(model: Any) -> None:
    model.classification_head.out_proj.weight.data *= 4


def stretch_a_weight(model: Any) -> None:
    weight = model.classification_head.dense.weight.data
    weight *= 0.02 * (1 + 6 / math.sqrt(2 * weight.numel())) / weight.std()


def ask_for_more(model: Any) -> None:
    model._init_weights = lambda module: module.not_there


@pytest.mark.parametrize(
    ("make", "fields", "change", "fresh"),
    [
        (small_t5, {}, None, True),
        (small_t5, {"initializer_factor": 0.5}, None, True),
        (small_t5, {}, torch.nn.Module.bfloat16, True),
        (small_bart, {}, None, True),
        (small_bart, {"init_std": 0.1}, None, True),
        (small_t5, {}, change_a_bias, False),
        (small_t5, {}, scale_a_weight, False),
        (small_bart, {}, scale_a_weight, False),
        (small_bart, {}, stretch_a_weight, False),
        (small_t5, {}, ask_for_more, False),
    ],
)
def test_a_head_is_fresh_if_it_looks_like_what_its_class_makes(
    make: Any, fields: dict[str, Any], change: Any, fresh: bool
) -> None:
    model = make(**fields)
    if change is not None:
        change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert facts_of(model).heads == (TaskHead("classification_head", fresh),)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_embedding_beside_the_body_is_no_new_head() -> None:
    sizes = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=96, d_model=32, **sizes)
    heads = facts_of(transformers.T5ForQuestionAnswering(config)).heads
    assert {head.name for head in heads if head.fresh} <= {"qa_outputs"}


# ------------------------------------------------------------------ rows that were added


def rows(count: int, added: int, off: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Trained rows, and added ones at their mean, off by a share of the spread."""
    torch.manual_seed(seed)
    old = torch.randn(count, 32)
    spread = (old - old.mean(0)).square().mean().sqrt()
    return torch.cat([old, (old.mean(0) + off * spread).expand(added, 32)])


def initial(weight: torch.Tensor, pad: int | None = None) -> list[InitialRows]:
    model = ToyForCausalLM()
    model.embed = nn.Embedding.from_pretrained(weight, freeze=False)
    model.head = nn.Linear(4, 9)
    model.config = SimpleNamespace(pad_token_id=pad)
    found = survey(model)
    every = initial_rows(found, base_facts(found, base_parameters(found)))
    return [one for one in every if one.module == "embed"]


@pytest.mark.parametrize(
    ("weight", "pad", "found"),
    [
        (rows(600, 0), None, None),
        (rows(600, 1), None, (600, 1, False)),
        (rows(600, 1), 600, (600, 1, True)),
        (rows(600, 2), 601, (600, 2, False)),
        (rows(600, 5, off=0.009), None, (600, 5, False)),
        (rows(600, 5, off=0.012), None, None),
        (torch.ones(6, 32), None, None),
        (torch.zeros(6, 32), None, None),
        (rows(1, 1), None, None),
        (torch.tensor([[-9.0], [9.0], [0.0]]).expand(3, 32), None, (2, 1, False)),
    ],
)
def test_added_rows_lie_at_the_mean(weight: torch.Tensor, pad: int | None, found: Any) -> None:
    seen = [(one.first, one.count, one.padding) for one in initial(weight, pad)]
    assert seen == ([] if found is None else [found])


def test_rows_at_the_mean_itself_are_found_with_no_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_values, "EQUAL", 0.0)
    weight = torch.tensor([[-9.0], [9.0], [0.0], [0.0]]).expand(4, 32)
    assert [(one.first, one.count) for one in initial(weight)] == [(2, 2)]


def test_rows_are_read_by_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_values, "CHUNK", 4)
    monkeypatch.setattr(base_values, "SAMPLE", 16)
    for added in (3, 4, 5, 9):
        (found,) = initial(rows(40, added))
        assert (found.first, found.count) == (40, added)
    assert base_values.readable_weight(SimpleNamespace(weight=torch.ones(4, 4).long())) is None
    assert base_values.readable_weight(nn.Embedding(1, 4)) is None
    assert base_values.readable_weight(nn.Embedding(2, 4)) is not None
