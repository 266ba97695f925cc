"""Counts are logical in every storage, and the rank table says what PEFT itself would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations import bitsandbytes as integration

from pytest_lora import ParameterCount, count_parameters, rank_table
from pytest_lora.inspection import parameters
from pytest_lora.inspection.base import base_facts, base_parameters
from pytest_lora.inspection.config import dry_run
from pytest_lora.inspection.parameters import stored_in_4bit
from pytest_lora.inspection.survey import survey

QV = ["q_proj", "v_proj"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**sizes, **changes})


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(**changes))


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def packed(model: nn.Module, storage: torch.dtype = torch.uint8) -> nn.Module:
    """Pack every linear layer but the head to 4 bits, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
                quant_storage=storage,
            )
            layer.load_state_dict(module.state_dict(), strict=False)
            model.set_submodule(name, layer.to("cpu"))
    return model


def eight_bit(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False
            )
            layer.load_state_dict(module.state_dict(), strict=False)
            model.set_submodule(name, layer.to("cpu"))
    return model


class WithValueHead(nn.Module):
    """As TRL wraps a policy: the model beside a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(32, 1)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_packed_weights_count_as_what_they_stand_for(storage: torch.dtype) -> None:
    model = packed(llama(), storage)
    counted = count_parameters(model)
    assert counted.total == numel(llama())
    assert counted.stored == numel(model) < counted.total
    linears = sum(m.in_features * m.out_features for m in llama().modules() if type(m) is nn.Linear)
    linears -= 50 * 32
    assert counted.total - counted.stored == linears - linears // 2 // storage.itemsize
    assert counted.stored_bytes == 4 * (counted.total - linears) + linears // 2


def test_adapter_on_a_packed_base() -> None:
    counted = count_parameters(get_peft_model(packed(llama()), LoraConfig(r=4, target_modules=QV)))
    adapter = 2 * 2 * (4 * 32 + 32 * 4)
    assert counted == ParameterCount(
        trainable=adapter,
        adapter=adapter,
        base=numel(llama()),
        total=numel(llama()) + adapter,
        stored=numel(packed(llama())) + adapter,
        stored_bytes=count_parameters(packed(llama())).stored_bytes + 4 * adapter,
    )
    assert counted.percent == 100 * adapter / counted.total
    assert counted.stored_percent == 100 * adapter / counted.stored


def test_an_unpacked_4_bit_layer_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(64, 32, bias=False)
    assert count_parameters(nn.Sequential(layer)).total == 64 * 32


def test_4_bit_embedding() -> None:
    embedding = bnb.nn.Embedding4bit(100, 64, quant_type="nf4")
    embedding.load_state_dict(nn.Embedding(100, 64).state_dict())
    embedding.to("cpu")
    assert numel(embedding) == 3200
    assert count_parameters(nn.Sequential(embedding)).total == 6400


def test_4_bit_fused_experts() -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize", reason="new in bitsandbytes 0.48")
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.randn(4, 64, 128))
    parametrize.replace_parameter_4bit(experts, "down_proj", quant_type="nf4")
    assert numel(experts) == 4 * 64 * 64
    assert count_parameters(experts).total == 4 * 64 * 128


def test_a_saved_copy_of_a_packed_layer_is_packed() -> None:
    model = packed(llama(), torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["v_proj"]))
    assert count_parameters(adapted).adapter == 2 * (4 * 32 + 32 * 4) + 2 * 32 * 32


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": QV},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": QV, "use_dora": True},
    "saved": {"target_modules": QV, "modules_to_save": ["norm", "lm_head"]},
    "tokens": {"target_modules": QV, "trainable_token_indices": [1, 2, 3]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "lora_bias": {"target_modules": QV, "lora_bias": True},
}
BASES = {"float": llama, "packed": lambda: packed(llama()), "8bit": lambda: eight_bit(llama())}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_agrees_with_peft_where_peft_can_count(base: str, setting: str) -> None:
    model = get_peft_model(BASES[base](), LoraConfig(r=4, **SETTINGS[setting]))
    counted = count_parameters(model)
    assert (counted.trainable, counted.total) == model.get_nb_trainable_parameters()
    assert counted.base == numel(llama())
    assert counted.adapter == counted.trainable


def test_tied_weights_count_once() -> None:
    tied = llama(tie_word_embeddings=True)
    assert count_parameters(tied).total == numel(llama()) - 50 * 32
    shared = T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=50)
    )
    adapted = get_peft_model(shared, LoraConfig(r=2, target_modules=["q", "v"]))
    assert count_parameters(adapted).total == numel(adapted)


def test_fused_experts() -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=50,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    if not any("gate_up_proj" in name for name, _ in model.named_parameters()):
        pytest.skip("this transformers keeps one module an expert")
    base = numel(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"]))
    counted = count_parameters(adapted)
    assert counted.base == base
    assert counted.adapter == 4 * 2 * (32 + 2 * 64) == counted.trainable


def test_all_adapters_count_whether_they_train_or_not() -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=QV))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    counted = count_parameters(model)
    norms = 5 * 32
    assert counted.adapter == 1024 + 256 + norms
    assert (
        counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) < counted.adapter
    )


def test_multihead_attention_whose_parameters_peft_replaces_whenever_modules_are_listed() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)
    base = numel(encoder)
    adapted = get_peft_model(encoder, LoraConfig(r=4, target_modules=["self_attn"]))
    counted = count_parameters(adapted)
    assert counted.base == base
    assert counted.adapter == counted.trainable == 2 * (4 * 32 + 96 * 4 + 4 * 32 + 32 * 4)


def test_a_plain_model_has_no_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    assert count_parameters(model) == ParameterCount(9, 0, 21, 21, 21, 84)


def test_an_empty_model() -> None:
    assert count_parameters(nn.ReLU()).percent == 0


def test_wrappers_change_nothing_but_what_they_add(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=QV))
    bare = count_parameters(model)
    assert count_parameters(torch.compile(model)) == bare
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/gloo", rank=0, world_size=1)
    try:
        assert count_parameters(nn.parallel.DistributedDataParallel(model)) == bare
    finally:
        torch.distributed.destroy_process_group()
    headed = count_parameters(WithValueHead(model))
    assert (headed.adapter, headed.base) == (bare.adapter, bare.base + 33)
    injected = llama()
    injected.add_adapter(LoraConfig(r=4, target_modules=QV))
    assert count_parameters(injected) == bare
    assert count_parameters(WithValueHead(injected)).adapter == bare.adapter


def test_a_packed_part_beside_the_adapted_one() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = packed(llama())
            self.language = get_peft_model(packed(llama()), LoraConfig(r=4, target_modules=QV))

    assert count_parameters(Pair()).base == 2 * numel(llama())


def test_counting_leaves_no_trace() -> None:
    model = get_peft_model(packed(llama()), LoraConfig(r=4, target_modules=QV))
    before = [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()]
    count_parameters(model)
    assert [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()] == before


def test_reads_like_pefts_own_line_and_says_why_others_differ() -> None:
    counted = ParameterCount(4_194_304, 4_194_304, 6_738_415_616, 6_742_609_920, 3_504_607_232, 1)
    assert str(counted) == (
        "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622\n"
        "4-bit weights are packed: sum(p.numel()) sees 3,504,607,232 stored numbers, "
        "so that other tools print 0.1197"
    )
    assert str(ParameterCount(1, 1, 3, 4, 4, 16)) == (
        "trainable params: 1 || all params: 4 || trainable%: 25.0000"
    )


@pytest.mark.parametrize("given", [None, 3, "model", LoraConfig()])
def test_what_is_no_model_is_named(given: object) -> None:
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, not "):
        count_parameters(given)


# The rank table: published figures first.

LLAMA_2_7B = [(4, 2_097_152, "0.031"), (8, 4_194_304, "0.062"), (16, 8_388_608, "0.124")]


@pytest.mark.parametrize("source", ["config", "config.json", "folder"])
def test_llama_2_7b(source: str, tmp_path: Path) -> None:
    config = LlamaConfig()
    config.save_pretrained(tmp_path)
    base = {"config": config, "config.json": tmp_path / "config.json", "folder": str(tmp_path)}[source]
    table = rank_table(base, [4, 8, 16], target_modules=QV)
    assert [(r.rank, r.trainable, f"{r.percent:.3f}") for r in table.rows] == LLAMA_2_7B
    assert {r.total for r in table.rows} == {table.total} == {6_738_415_616}
    assert [r.alpha for r in table.rows] == [8, 16, 32]
    assert [r.adapter_bytes for r in table.rows] == [4 * r.trainable for r in table.rows]
    packed_numbers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    for row in table.rows:
        stored = 6_738_415_616 - packed_numbers // 2 + row.trainable
        assert row.stored_percent == 100 * row.trainable / stored


@pytest.mark.parametrize(
    ("config", "targets", "rank", "trainable"),
    [
        pytest.param(RobertaConfig(), ["query", "value"], 8, 294_912, id="RoBERTa-base"),
        pytest.param(
            RobertaConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
            ),
            ["query", "value"],
            8,
            786_432,
            id="RoBERTa-large",
        ),
        pytest.param(
            OPTConfig(
                hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=4 * 12288,
                word_embed_proj_dim=12288, max_position_embeddings=2048, vocab_size=50257,
            ),
            QV,
            1,
            4_718_592,
            id="GPT-3",
        ),
    ],
)  # fmt: skip
def test_figures_of_the_lora_paper(config: Any, targets: list[str], rank: int, trainable: int) -> None:
    assert rank_table(config, [rank], target_modules=targets).rows[0].trainable == trainable


def directly(base: nn.Module, rank: int, **fields: Any) -> tuple[int, int, int]:
    """Trainable numbers, all numbers, bytes of the saved tensors: asked of PEFT on a live model."""
    model = get_peft_model(base, LoraConfig(r=rank, **fields))
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, numel(model), sum(t.numel() * t.element_size() for t in saved.values())


@st.composite
def lora_fields(draw: st.DrawFn) -> dict[str, Any]:
    targets = draw(st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True))
    return {
        "target_modules": targets,
        "rank_pattern": draw(st.dictionaries(st.sampled_from(PROJECTIONS), st.integers(1, 9), max_size=2)),
        "use_dora": draw(st.booleans()),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "modules_to_save": draw(st.sampled_from([None, ["norm"], ["lm_head"]])),
        "layers_to_transform": draw(st.sampled_from([None, [0], [1]])),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian", "pissa"])),
    }


@given(lora_fields(), st.lists(st.integers(1, 32), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_every_row_is_what_peft_does(fields: dict[str, Any], ranks: list[int]) -> None:
    config = llama_config(attention_bias=True)
    base = LlamaForCausalLM(config)
    table = rank_table(config, ranks, **fields)
    assert [row.rank for row in table.rows] == ranks
    for row in table.rows[:3]:
        live = LlamaForCausalLM(config)
        trainable, everything, saved = directly(live, row.rank, **{**fields, "init_lora_weights": True})
        assert (row.trainable, row.total, row.adapter_bytes) == (trainable, numel(base), saved)
        assert row.percent == 100 * trainable / numel(base)
        halved = sum(
            m.in_features * m.out_features // 2
            for n, m in base.named_modules()
            if isinstance(m, nn.Linear) and n != "lm_head"
        )
        assert row.stored_percent == 100 * trainable / (everything - halved)


def test_a_hundred_ranks_cost_two_questions_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(config: LoraConfig, model: nn.Module) -> Any:
        asked.append(config.r)
        return dry_run(config, model)

    monkeypatch.setattr(parameters, "dry_run", counted)
    fields: dict[str, Any] = {"target_modules": QV, "use_dora": True, "rank_pattern": {"v_proj": 3}}
    table = rank_table(llama_config(), range(1, 101), **fields)
    assert asked == [1, 100]
    trainable, _, saved = directly(llama(), 37, **fields)
    assert (table.rows[36].trainable, table.rows[36].adapter_bytes) == (trainable, saved)


def test_config_path_live_float_live_packed_give_the_same(tmp_path: Path) -> None:
    llama_config().save_pretrained(tmp_path)
    bases = [llama_config(), tmp_path, llama(), packed(llama()), packed(llama(), torch.uint8)]
    tables = [rank_table(base, range(1, 9), target_modules="all-linear", use_dora=True) for base in bases]
    assert all(table == tables[0] for table in tables)


def test_packed_with_another_storage_is_taken_as_it_is() -> None:
    model = packed(llama(), torch.bfloat16)
    row = rank_table(model, [4], target_modules=QV).rows[0]
    assert row.stored_percent == 100 * row.trainable / (numel(model) + row.trainable)


def test_live_base_is_left_alone() -> None:
    model = packed(llama())
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    rank_table(model, [2, 4], target_modules="all-linear")
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before
    assert not hasattr(model, "peft_config")


def test_linear_in_between_and_asked_where_the_rank_may_be_refused() -> None:
    conv = nn.Sequential(nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(16, 4, 1))
    table = rank_table(conv, [4, 8, 16], target_modules=["0", "1"])
    expected = [
        directly(nn.Sequential(*map(type_copy, conv)), r, target_modules=["0", "1"]) for r in (4, 8, 16)
    ]
    assert [(r.trainable, r.adapter_bytes) for r in table.rows] == [(t, b) for t, _, b in expected]
    with pytest.raises(
        ValueError,
        match=r"^lora_kwargs: PEFT refuses them on this base at r=6: .*groups=4 and rank 6",
    ):
        rank_table(conv, [4, 6, 8], target_modules=["0", "1"])


def type_copy(module: nn.Module) -> nn.Module:
    assert isinstance(module, nn.Conv2d)
    return nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        groups=module.groups,
    )


ONLY_TRANSFORMERS_5 = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 also keeps modules with a tied or a last bias"
)
ARCHITECTURES = [
    (LlamaForCausalLM, llama_config()),
    (LlamaForCausalLM, llama_config(tie_word_embeddings=True)),
    (LlamaForSequenceClassification, llama_config(num_labels=3)),
    pytest.param(
        RobertaForMaskedLM,
        RobertaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=50,
            tie_word_embeddings=False,
        ),
        marks=ONLY_TRANSFORMERS_5,
    ),
    (
        GPT2LMHeadModel,
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2),
    ),
    pytest.param(
        BertForSequenceClassification,
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
        ),
        marks=ONLY_TRANSFORMERS_5,
    ),
]


@pytest.mark.parametrize(("model_class", "config"), ARCHITECTURES)
def test_what_would_be_packed_is_what_transformers_packs(
    model_class: type[PreTrainedModel], config: Any
) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:
        get_keys_to_not_convert = integration.get_keys_to_not_convert
    with torch.device("meta"):
        model, loaded = model_class(config), model_class(config)
    kept = get_keys_to_not_convert(loaded)
    loaded = integration.replace_with_bnb_linear(
        loaded, modules_to_not_convert=kept, quantization_config=quantization
    )
    replaced = sum(
        m.in_features * m.out_features for m in loaded.modules() if isinstance(m, bnb.nn.Linear4bit)
    )
    found = survey(model)
    parameters = base_parameters(found)
    assert replaced
    assert stored_in_4bit(base_facts(found, parameters), parameters) == numel(model) - replaced // 2


def test_alpha_and_dtype() -> None:
    fixed = rank_table(llama_config(), [4, 8], target_modules=QV, lora_alpha=16)
    assert [row.alpha for row in fixed.rows] == [16, 16]
    half = rank_table(llama_config(), [4], target_modules=QV, alpha_ratio=0.5, adapter_dtype=torch.bfloat16)
    assert half.rows[0].alpha == 2
    assert half.rows[0].adapter_bytes == 2 * half.rows[0].trainable
    assert half.adapter_dtype == "bfloat16"


def test_table_as_text_and_markdown() -> None:
    table = rank_table(LlamaConfig(), [4, 8, 16], target_modules=QV)
    assert str(table) == (
        "LoRA on LlamaForCausalLM, 6,738,415,616 parameters\n"
        "rank  alpha  trainable  trainable %  adapter MB  % by packed storage\n"
        "   4      8  2,097,152        0.031        8.39                0.060\n"
        "   8     16  4,194,304        0.062       16.78                0.120\n"
        "  16     32  8,388,608        0.124       33.55                0.239\n"
        "MB = 10^6 bytes, float32. By packed storage: what numel() makes of the 4-bit model, "
        "where one byte holds two weights."
    )
    assert table.to_markdown().splitlines()[:3] == [
        "| rank | alpha | trainable | trainable % | adapter MB | % by packed storage |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 4 | 8 | 2,097,152 | 0.031 | 8.39 | 0.060 |",
    ]


def test_small_percentages_keep_their_digits() -> None:
    table = rank_table(LlamaConfig(num_hidden_layers=1, vocab_size=2_000_000), [1], target_modules=["q_proj"])
    assert " 0.00005 " not in str(table)
    assert f" {100 * 8192 / table.total:.2g} " in str(table)


@pytest.mark.parametrize(
    ("ranks", "error", "message"),
    [
        ([], ValueError, r"^ranks must not be empty$"),
        ([4, 0], ValueError, r"^ranks must be at least 1, not 0$"),
        ([-8], ValueError, r"^ranks must be at least 1, not -8$"),
        ([True], TypeError, r"^ranks must be a whole number, not True$"),
        ([4.0], TypeError, r"^ranks must be a whole number, not 4.0$"),
        ("48", TypeError, r"^ranks must be whole numbers such as \[4, 8, 16\], not '48'$"),
        (8, TypeError, r"^ranks must be whole numbers such as \[4, 8, 16\], not 8$"),
    ],
)
def test_bad_ranks_are_named(ranks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rank_table("/no/such/place", ranks, target_modules=QV)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 4}, TypeError, r"^lora_kwargs: r is what ranks is for"),
        ({"target": QV}, TypeError, r"^lora_kwargs: .*unexpected keyword argument 'target'"),
        ({"target_modules": QV, "init_lora_weights": "nonsense"}, ValueError, "nonsense"),
        (
            {"target_modules": ["q_porj"]},
            ValueError,
            r"^lora_kwargs: PEFT refuses them on this base at r=4: .*q_porj",
        ),
        ({"alpha_ratio": "2"}, TypeError, r"^alpha_ratio must be a number"),
        ({"alpha_ratio": 0}, ValueError, r"^alpha_ratio must be a finite number above 0"),
        ({"adapter_dtype": "float33"}, ValueError, r"^adapter_dtype must be a torch dtype"),
        ({"adapter_dtype": "int8"}, ValueError, r"^adapter_dtype must be a floating-point dtype"),
        ({"adapter_dtype": 4}, TypeError, r"^adapter_dtype must be a torch dtype"),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rank_table(llama_config(), [4], **fields)


def test_bad_bases_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^base must be a torch.nn.Module, a transformers PretrainedConfig"):
        rank_table(3, [4], target_modules=QV)
    with pytest.raises(ValueError, match=r"^base: .*config.json does not exist"):
        rank_table(tmp_path / "config.json", [4], target_modules=QV)
    adapted = get_peft_model(llama(), LoraConfig(target_modules=QV))
    with pytest.raises(ValueError, match=r"^base: this PeftModel\w* carries an adapter already"):
        rank_table(adapted, [4], target_modules=QV)
