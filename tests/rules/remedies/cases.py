"""Faulty scripts beyond the examples of the documentation, with the rule whose fix is to mend them."""

from __future__ import annotations

from typing import Any

from tests.rules.test_config_rules import FAULTY, QV


def configuration(base: str, fields: dict[str, Any], expect: str = "None") -> str:
    """A script that checks a configuration on one of the bases of the examples."""
    fields = {"target_modules": ["q_proj", "v_proj"], **fields}
    written = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"base = {base}\nconfig = LoraConfig({written})\nreport = check_config(config, base, expect={expect})\n"


CONFIGURATIONS: list[tuple[str, str, dict[str, Any]]] = [
    *FAULTY,
    ("LORA101", "base", {"alpha_pattern": {"v_proj": 0}}),
    ("LORA101", "base", {"lora_alpha": 0, "use_rslora": True, "r": 16}),
    ("LORA102", "base", {"r": 16, "lora_alpha": 0.25, "use_rslora": True}),
    ("LORA102", "base", {"r": 8, "alpha_pattern": {"v_proj": 0.125}}),
    ("LORA103", "base", {"r": 16, "lora_alpha": 64, "use_rslora": True}),
    ("LORA103", "base", {"r": 4, "lora_alpha": 256, "alpha_pattern": {"q_proj": 8}}),
    ("LORA104", "base", {"target_modules": "all_linear"}),
    ("LORA104", "base", {"target_modules": ["all-linear"]}),
    ("LORA104", "nn.Sequential(nn.Conv2d(64, 64, 3))", {"target_modules": "all-linear"}),
    ("LORA104", "base", {"target_modules": "q_proj,v_proj"}),
    ("LORA104", "base", {"target_modules": "['q_proj', 'v_proj']"}),
    ("LORA104", "base", {"target_modules": "q_prj|v_prj"}),
    ("LORA104", "base", {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)"}),
    ("LORA104", "base", {"target_modules": r"layers\.\d+\.self_attn\.(q|v)_proj"}),
    ("LORA104", "base", {"target_modules": r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj"}),
    ("LORA104", "base", {"target_modules": "^q_proj$"}),
    ("LORA104", "base", {"target_modules": r"transformer\.h\.\d+\.c_attn"}),
    ("LORA104", "base", {"target_modules": [".*q_proj", "v_proj"]}),
    ("LORA104", "base", {"target_modules": ["*_proj"]}),
    ("LORA104", "base", {"target_modules": ["query_key_value"]}),
    ("LORA104", "base", {"target_modules": ["q_prj", "v_proj"]}),
    ("LORA104", "base", {"target_modules": ["q_proj", "v_proj", "v_proj2"]}),
    ("LORA104", "base", {"target_modules": ["base_model.model.model.layers.0.self_attn.q_proj"]}),
    ("LORA104", "fused_moe", {"target_modules": ["q_proj", "w1", "w2"]}),
    ("LORA104", "moe_base", {"target_modules": ["q_proj", "gate_up_proj", "down_proj"], "lora_dropout": 0.1}),
    ("LORA104", "fused_moe", {"target_modules": ["q_proj", "gate_up_proj", "down_proj"]}),
    ("LORA104", "fused_moe", {"target_modules": ["down_proj"]}),
    ("LORA104", "fused_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_proj"]}),
    ("LORA104", "base", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    (
        "LORA104",
        "shared_experts",
        {"target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    ("LORA105", "base", {"layers_to_transform": [9]}),
    ("LORA106", "base", {"target_modules": "all-linear", "exclude_modules": ["mlp", "lm_head"]}),
    ("LORA106", "base", {"exclude_modules": "mlp"}),
    ("LORA107", "base", {"rank_pattern": {"k_proj": 4}}),
    ("LORA107", "base", {"rank_pattern": {"nothing": 4, "q_proj": 16}, "alpha_pattern": {"q_proj": 16}}),
    ("LORA107", "base", {"rank_pattern": {".*": 4, "q_proj": 16}}),
    ("LORA107", "base", {"target_modules": ".*(q|v)_proj", "rank_pattern": {"k_proj": 4}}),
    ("LORA108", "base", {"use_rslora": True, "alpha_pattern": {"q_proj": 256}}),
    ("LORA109", "base", {"target_modules": ["k_proj", "gate_proj"], "r": 64, "lora_alpha": 64}),
    ("LORA109", "base", {"target_modules": ["k_proj"], "r": 64, "lora_alpha": 64, "use_rslora": True}),
    ("LORA109", "classifier_base", {"target_modules": ["q_proj", "score"], "modules_to_save": []}),
    ("LORA110", "base", {"modules_to_save": ["lm_head", "nothing_like_it"]}),
    ("LORA111", "base", {"target_modules": ["lm_head"], "modules_to_save": ["lm_head", "norm"]}),
    ("LORA112", "classifier_base", {"target_modules": ["q_proj", "score"]}),
    ("LORA112", "classifier_base", {"modules_to_save": ["norm"]}),
    ("LORA113", "tied_base", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("LORA113", "tied_base", {"target_modules": ".*(q_proj|lm_head)"}),
    ("LORA115", "fused_moe", {"target_parameters": ["experts.down_proj"], "init_lora_weights": "pissa"}),
    ("LORA117", "gpt2_base", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    ("LORA120", "base", {"trainable_token_indices": {"embed_tokens": [-1, 5]}}),
    ("LORA122", "classifier_base", {"task_type": "CAUSAL_LM", "modules_to_save": ["score"]}),
    ("LORA123", "base_4bit", {"target_modules": "all-linear", "modules_to_save": ["down_proj"]}),
    ("LORA124", "base", {"r": -1}),
    ("LORA124", "base", {"rank_pattern": {"q_proj": 0}}),
    ("LORA124", "base", {"rank_pattern": {"q_proj": "16"}}),
    ("LORA124", "base", {"rank_pattern": {"*q_proj": 16}}),
    ("LORA104", "base", {"target_modules": "("}),
    ("LORA124", "base", {"bias": "true"}),
    ("LORA124", "base", {"target_modules": ["self_attn", "mlp"]}),
    ("LORA124", "base", {"target_modules": ["q_proj", "norm"]}),
    ("LORA124", "base", {"target_modules": ".*self_attn.*"}),
    ("LORA124", "fused_moe", {"target_modules": ["q_proj", "experts"]}),
    ("LORA124", "fused_moe", {"target_parameters": ["experts.down_proj"], "lora_dropout": 0.1}),
    ("LORA124", "base", {"target_modules": "all-linear", "exclude_modules": ".*"}),
    ("LORA124", "base", {"modules_to_save": ["q_proj", "v_proj"]}),
    ("LORA124", "base", {"init_lora_weights": "no such method"}),
    ("LORA124", "nn.Sequential(nn.Conv2d(64, 64, 3, groups=4))", {"target_modules": ["0"], "r": 6}),
    ("LORA124", "base", {"target_modules": ["q_proj", "embed_tokens"], "trainable_token_indices": [5]}),
    ("LORA124", "base", {"layer_replication": [(0, 9)]}),
    ("LORA131", "base", {"r": 8, "rank_pattern": {"q_proj": 5}, "init_lora_weights": "orthogonal"}),
]
"""The rule, the base and the fields of a configuration."""

MEANT = [
    ("LORA112", "classifier_base", {}, "Expect(fresh=True)"),
    ("LORA114", "vision_language_base", {"target_modules": "all-linear"}, "Expect(scope='language_model')"),
    ("LORA114", "vision_language_base", {"target_modules": ["v_proj"]}, "Expect(scope='language_model')"),
    ("LORA119", "base", {"modules_to_save": ["lm_head"]}, "Expect(new_tokens=2)"),
    ("LORA119", "tied_base", {}, "Expect(new_tokens=2)"),
    ("LORA119", "base", {"trainable_token_indices": {"embed_tokens": [5]}}, "Expect(new_tokens=2)"),
    ("LORA126", "base", {"r": 16}, f"Expect(config=LoraConfig(r=8, target_modules={QV}))"),
    ("LORA126", "base", {"target_modules": ["k_proj"]}, f"Expect(config=LoraConfig(target_modules={QV}))"),
    ("LORA126", "base", {"rank_pattern": {"q_proj": 4}}, f"Expect(config=LoraConfig(target_modules={QV}))"),
    ("LORA126", "base", {"use_rslora": True}, f"Expect(config=LoraConfig(target_modules={QV}))"),
    ("LORA127", "base", {"r": 8, "use_rslora": True}, "Expect(alpha_ratio=2.0)"),
    ("LORA127", "base", {"r": 8, "rank_pattern": {"q_proj": 16}}, "Expect(alpha_ratio=1.0)"),
    ("LORA128", "base", {"r": 16}, "Expect(param_ratio=(0.001, 0.02))"),
]
"""The same, with what is expected."""

ADAPTED = f"model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules={QV}))\n"

LOADED = """
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base.save_pretrained('base')
base = AutoModelForCausalLM.from_pretrained('base', dtype=torch.bfloat16%s)
%s
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=['q_proj', 'v_proj']))
report = check_model(model)
"""
FOUR_BITS = ", quantization_config=BitsAndBytesConfig(load_in_4bit=True)"

SEQUENCES = """
from transformers import T5Config, T5ForSequenceClassification
sizes = dict(vocab_size=128, d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4, decoder_start_token_id=0)
t5 = T5ForSequenceClassification(T5Config(**sizes))
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"], task_type="SEQ_CLS")
"""

MODELS = [
    ("LORA112", SEQUENCES + "report = check_config(config, t5)\n"),
    ("LORA112", SEQUENCES + "model = get_peft_model(t5, config)\nreport = check_model(model)\n"),
    ("LORA221", LOADED % ("", "base.config.quantization_config = {'load_in_4bit': True}")),
    ("LORA223", LOADED % (FOUR_BITS, "")),
    ("LORA201", "model = PeftModel.from_pretrained(base, adapter())\nreport = check_model(model)"),
    ("LORA201", "model = base\nmodel.load_adapter(str(adapter()))\nreport = check_model(model)"),
    (
        "LORA202",
        f"model = base\nmodel.add_adapter(LoraConfig(target_modules={QV}))\nmodel.disable_adapters()\n"
        "report = check_model(model)",
    ),
    ("LORA204", f"{ADAPTED}model.base_model.model.lm_head.requires_grad_(True)\nreport = check_model(model)"),
    (
        "LORA206",
        f"model = get_peft_model(base, LoraConfig(target_modules={QV}, modules_to_save=['lm_head'])).half()\n"
        "report = check_model(model)",
    ),
    (
        "LORA213",
        f"model = get_peft_model(tied_base, LoraConfig(target_modules={QV}, modules_to_save=['lm_head']))\n"
        "report = check_model(model)",
    ),
    ("LORA215", f"{ADAPTED}model.base_model.set_adapter([])\nreport = check_model(model)"),
    (
        "LORA211",
        """
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
model = get_peft_model(base, config, adapter_name="first")
model.add_adapter("second", config)
for module in model.modules():
    if hasattr(module, "lora_A"):
        module.delete_adapter("first")
        module.set_adapter("second")
del model.peft_config["first"]
model.active_adapter = "second"
report = check_model(model)
""",
    ),
    (
        "LORA228",
        """
model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj"]))
for module in model.modules():
    if hasattr(module, "set_scale"):
        module.scaling["default"] = 1.0
report = check_model(model)
""",
    ),
    (
        "LORA224",
        f"{ADAPTED}for name, p in model.named_parameters():\n    'lora_B' in name and p.requires_grad_(False)\n"
        "report = check_model(model)",
    ),
    (
        "LORA228",
        f"{ADAPTED}for m in model.modules():\n    hasattr(m, 'scale_layer') and m.scale_layer(0)\n"
        "report = check_model(model)",
    ),
    ("LORA232", f"{ADAPTED}model.peft_config['default'].r = 4\nreport = check_model(model)"),
]
"""The rule, and a script with a faulty model."""

TRAINABLE = "[p for p in model.parameters() if p.requires_grad]"


def training(change: str = "", optimizer: str = "AdamW", **options: float) -> str:
    """A script that checks a training, with a change of the model or the batch and the options of the optimizer."""
    given = ", ".join(f"{name}={value!r}" for name, value in {"lr": 1e-3, **options}.items())
    made = f"optimizer = torch.optim.{optimizer}({TRAINABLE}, {given})"
    return f"{ADAPTED}{change}\n{made}\nreport = check_training(model, batch, optimizer=optimizer)"


TRAININGS = [
    ("LORA303", training(optimizer="SGD", lr=0.0)),
    (
        "LORA303",
        f"{ADAPTED}report = check_loss_decreases(model, batch, learning_rate=0.0, ignore=['LORA316'])",
    ),
    ("LORA304", training(optimizer="SGD", lr=1e4)),
    ("LORA305", training(eps=1e4)),
    ("LORA306", training(lr=10.0, weight_decay=0.01)),
    ("LORA306", training(lr=10.0, weight_decay=20.0)),
    (
        "LORA308",
        training("model.half()")
        .replace("optimizer=optimizer", "optimizer=optimizer, scaler=scaler")
        .replace("report =", "scaler = torch.amp.GradScaler('cpu', init_scale=64.0)\nreport ="),
    ),
    ("LORA313", training("model.requires_grad_(False)").replace(TRAINABLE, "list(model.parameters())")),
    ("LORA313", training("model.merge_adapter()")),
    (
        "LORA313",
        training("model.base_model.disable_adapter_layers()").replace(TRAINABLE, "list(model.parameters())"),
    ),
    ("LORA313", training("for n, p in model.named_parameters():\n    'lora_A' in n and p.data.zero_()")),
    ("LORA313", training().replace("lora_alpha=16", "lora_alpha=0")),
    ("LORA313", training().replace("lora_alpha=16", "lora_dropout=1.0")),
    (
        "LORA369",
        "from transformers import MBartConfig, MBartForCausalLM\n"
        "sizes = {'d_model': 32, 'decoder_layers': 1, 'decoder_attention_heads': 2, 'decoder_ffn_dim': 64}\n"
        "sizes.update(vocab_size=128, is_decoder=True, is_encoder_decoder=False)\n"
        "unshifted = MBartForCausalLM(MBartConfig(**sizes))\n"
        "model = get_peft_model(unshifted, LoraConfig(target_modules=['q_proj', 'v_proj']))\n"
        "batch['input_ids'] %= 128\nbatch['labels'] = batch['input_ids'].clone()\n"
        "report = check_training(model, batch)",
    ),
    (
        "LORA321",
        training(
            "batch['input_ids'][:, 6:] = 0\nbatch.pop('attention_mask')\n"
            "batch['labels'] = batch['input_ids'].clone()"
        ),
    ),
]
"""The rule, and a script with a faulty training."""

KEPT = "lambda tensors: {k: v for k, v in tensors.items() if %s}"

CHECKPOINTS = [
    ("LORA415", "path = adapter()\nconfigure(path, peft_type='LOHA')\nreport = check_checkpoint(path)"),
    ("LORA414", "path = adapter()\nconfigure(path, peft_type=None)\nreport = check_checkpoint(path)"),
    (
        "LORA425",
        "path = adapter(use_dora=True)\nconfigure(path, use_dora=False)\nreport = check_checkpoint(path, base)",
    ),
    (
        "LORA425",
        "path = adapter(use_dora=True)\nconfigure(path, use_dora=False)\nreport = check_checkpoint(path)",
    ),
    (
        "LORA425",
        "path = adapter()\nconfigure(path, target_modules=['q_proj'])\nreport = check_checkpoint(path, base)",
    ),
    (
        "LORA425",
        "path = adapter()\nconfigure(path, layers_to_transform=[0])\nreport = check_checkpoint(path)",
    ),
    (
        "LORA431",
        "path = adapter(rank_pattern={'v_proj': 4})\nconfigure(path, rank_pattern={})\n"
        "report = check_checkpoint(path)",
    ),
    (
        "LORA431",
        "path = adapter(rank_pattern={'v_proj': 4})\nconfigure(path, rank_pattern={'v_proj': 2})\n"
        "report = check_checkpoint(path)",
    ),
    (
        "LORA452",
        "path = adapter()\nbase.name_or_path = 'org/llama'\nconfigure(path, base_model_name_or_path=None)\n"
        "report = check_checkpoint(path, base)",
    ),
]
"""The rule, and a script with a faulty saved adapter."""

RENAMED = [
    "'lower.' + k",
    "k.removeprefix('base_model.model.')",
    "'base_model.model.' + k",
    "k.removesuffix('.weight')",
]
"""What keys of saved adapters are called in place of ``k``."""


def renamed(key: str) -> str:
    """A script that checks a saved adapter with other keys."""
    edited = f"edit(path, lambda tensors: {{{key}: v for k, v in tensors.items()}})"
    return f"path = adapter()\n{edited}\nreport = check_checkpoint(path)\n"


AXOLOTL = """
base_model: Qwen/Qwen2.5-0.5B
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
datasets:
  - path: data/train.jsonl
    type: alpaca
sequence_len: 1024
micro_batch_size: 2
num_epochs: 2
learning_rate: 0.0002
attn_implementation: sdpa
"""

LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity
template: qwen
cutoff_len: 1024
output_dir: out
per_device_train_batch_size: 1
learning_rate: 1.0e-4
num_train_epochs: 3.0
bf16: true
"""

TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dtype: bfloat16
dataset_name: trl-lib/Capybara
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
learning_rate: 2.0e-4
per_device_train_batch_size: 2
max_length: 1024
output_dir: out
bf16: true
"""


def recipe(text: str, *changes: str, without: str = "") -> str:
    """A script that checks a recipe with other lines, lines that it had not, and less one."""
    for change in (f"{without}:", *changes):
        key = change.partition(":")[0]
        lines = [line for line in text.splitlines() if not line.startswith(f"{key}:")]
        text = "\n".join([*lines, *([change] if key != without else []), ""])
    return (
        "from pathlib import Path\n"
        f"recipe = Path('recipe.yaml')\nrecipe.write_text({text!r})\nreport = check_recipe(recipe)\n"
    )


BEST = "load_best_model_at_end: true"
RECIPES = [
    ("LORA601", recipe(AXOLOTL).replace("  - path", r"\t- path")),
    ("LORA602", recipe(f"{AXOLOTL}lora_alpha: 64\n")),
    ("LORA603", recipe(AXOLOTL, "lora_dropoout: 0.05")),
    ("LORA603", recipe(TRL, "no_such_thing_at_all: 3")),
    ("LORA610", recipe(AXOLOTL, "load_in_4bit: true")),
    ("LORA611", recipe(TRL, "use_peft: false")),
    ("LORA620", recipe(TRL, "max_steps: 200", "warmup_steps: 300")),
    ("LORA621", recipe(TRL, "learning_rate: 0.5")),
    ("LORA621", recipe(LLAMA_FACTORY, "learning_rate: 5.0e-6")),
    ("LORA621", recipe(LLAMA_FACTORY, "stage: dpo", "dataset: dpo_en_demo", "learning_rate: 1.0e-3")),
    ("LORA622", recipe(TRL, BEST)),
    ("LORA622", recipe(TRL, BEST, "eval_strategy: epoch", "save_strategy: steps")),
    ("LORA622", recipe(TRL, BEST, "eval_strategy: steps", "eval_steps: 100", "save_steps: 250")),
    ("LORA623", recipe(TRL, "bf16: false", "fp16: true")),
    ("LORA624", recipe(TRL, "packing: true")),
    ("LORA624", recipe(LLAMA_FACTORY, "packing: true")),
    ("LORA630", recipe(AXOLOTL, "lora_target_modules: [q_proj, v_proj]")),
    ("LORA633", recipe(TRL, "lora_r: 512", without="lora_alpha")),
]
"""The rule, and a script with a faulty recipe of Axolotl, LLaMA-Factory or TRL."""

CASES = [
    *MODELS,
    *CHECKPOINTS,
    *(("LORA422", renamed(key)) for key in RENAMED),
    *RECIPES,
    *TRAININGS,
    *((code, configuration(base, fields)) for code, base, fields in CONFIGURATIONS),
    *((code, configuration(base, fields, expect)) for code, base, fields, expect in MEANT),
]
