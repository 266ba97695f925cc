"""Fixes in prose that a program can still apply: what each says, and the lines of the example that it changes."""

from __future__ import annotations

from typing import NamedTuple


class Rewriting(NamedTuple):
    """What the fix has to say, and what a reader of it writes in place of which lines.

    ``gone`` is the end of modules whose values the fix makes anew, as it says, or hides in a flat parameter.
    """

    said: str
    old: str
    new: str
    gone: str | None = None


_DDP = "wrapped = in_one_process(nn.parallel.DistributedDataParallel, model"
_CAST = """for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
"""
_POLICY = """from peft.utils.other import fsdp_auto_wrap_policy
settings = {
    "device_id": torch.device("cpu"),
    "use_orig_params": False,
    "auto_wrap_policy": fsdp_auto_wrap_policy(model),
}
"""
_BASE_LAYERS = """for name, module in model.named_modules():
    if name.endswith("base_layer"):
        in_one_process(fully_shard, module)
"""
_WHOLE_LAYERS = """for layer in model.base_model.model.model.layers:
    in_one_process(fully_shard, layer)
"""

_COMBINED = 'model.add_weighted_adapter(["default"], [1.0], "combined", combination_type="linear")\n'
_SCALED_ONCE = """model.peft_config["combined"].use_rslora = False
for module in model.modules():
    if hasattr(module, "lora_A"):
        module.scaling["combined"] = 1.0
        getattr(module, "use_rslora", {})["combined"] = False  # of newer PEFT
"""
_EMPTIED = """with torch.no_grad():
    for weight in base.model.layers[1].parameters():
        weight.zero_()
"""
_LOADED_AGAIN = "base = type(base).from_pretrained('base')\n"
_POSITIONS = 'grid_batch["position_ids"] = torch.arange(16).expand(2, 16)\n'
_OWN_POSITIONS = """grid_batch["input_ids"][:, 0] = 7  # the start of an image, as its processor puts it there
own = {name: kept for name, kept in grid_batch.items() if name not in ("labels", "pixel_values")}
grid_batch["position_ids"] = model.base_model.model.model.get_rope_index(**own)[0]
"""
_DIFFERENT = """differ = (pairs["chosen_input_ids"] != pairs["rejected_input_ids"]).any(1)
pairs = {name: values[differ] for name, values in pairs.items()}
"""

REWRITTEN: dict[str, list[Rewriting]] = {
    "LORA249": [
        Rewriting(
            "call set_adapter or requires_grad_ first, then wrap the model in DistributedDataParallel again",
            f'{_DDP})\nmodel.set_adapter("second")',
            f'model.set_adapter("second")\n{_DDP})',
        ),
    ],
    "LORA250": [
        Rewriting("model.set_adapter freezes", _DDP, f'model.set_adapter("default")\n{_DDP}'),
        Rewriting("find_unused_parameters=True", f"{_DDP})", f"{_DDP}, find_unused_parameters=True)"),
    ],
    "LORA251": [
        Rewriting("use_reentrant False", '"use_reentrant": True', '"use_reentrant": False'),
        Rewriting("leave find_unused_parameters out", ", find_unused_parameters=True", ""),
    ],
    "LORA252": [
        Rewriting("leave find_unused_parameters out", ", find_unused_parameters=True", ""),
    ],
    "LORA253": [
        Rewriting("bnb_4bit_quant_storage='bfloat16'", "storage=torch.float32", "storage=torch.bfloat16"),
        Rewriting("take param_dtype out of the policy", "param_dtype=torch.bfloat16", ""),
    ],
    "LORA254": [
        Rewriting("cast what is trained to one dtype", "report =", f"{_CAST}report ="),
        Rewriting(
            "shard the modules of the other dtype first",
            "report =",
            "in_one_process(fully_shard, model.base_model.model.lm_head.modules_to_save.default)\nreport =",
        ),
    ],
    "LORA255": [
        Rewriting(
            "auto_wrap_policy=peft.utils.other.fsdp_auto_wrap_policy(model) and use_orig_params=False",
            'settings = {"device_id": torch.device("cpu"), "use_orig_params": True}\n',
            _POLICY,
            gone="_proj",
        ),
        Rewriting(
            "use the second FSDP (fully_shard)",
            "in_one_process(FullyShardedDataParallel, model, **settings)",
            "in_one_process(torch.distributed.fsdp.fully_shard, model)",
        ),
    ],
    "LORA256": [
        Rewriting("wrap whole decoder layers, not single linear layers", _BASE_LAYERS, _WHOLE_LAYERS),
    ],
    "LORA257": [
        Rewriting(
            "copy the numbers, not the tensors: own.weight.data.copy_(other.weight.data)",
            """.weight = module.lora_A["default"].weight
        module.lora_B["reference"].weight = module.lora_B["default"].weight
""",
            """.weight.data.copy_(module.lora_A["default"].weight.data)
        module.lora_B["reference"].weight.data.copy_(module.lora_B["default"].weight.data)
""",
        ),
    ],
    "LORA258": [
        Rewriting(
            "activate the sources together (set_adapter of the tuner takes a list of names)",
            _COMBINED,
            'model.base_model.set_adapter(["default"])\n',
            gone="q_proj",  # the sum is not made
        ),
        Rewriting(
            "its scaling is 1 and neither its configuration nor its layers ask for rsLoRA",
            "report =",
            f"{_SCALED_ONCE}report =",
        ),
    ],
    "LORA259": [
        Rewriting(
            "load the base again", _EMPTIED, f'base.save_pretrained("base")\n{_EMPTIED}{_LOADED_AGAIN}'
        ),
    ],
    "LORA348": [
        Rewriting(
            "let the loop call update_and_allocate of the tuner (model.base_model) with the number of the step",
            "    optimizer.step()\n",
            "    optimizer.step()\n    model.base_model.update_and_allocate(step)\n",
            gone="_proj",  # it trains otherwise
        ),
    ],
    "LORA369": [
        Rewriting(
            "logits[:, :-1] against labels[:, 1:]",
            """.logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())""",
            """.logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())""",
        ),
    ],
    "LORA374": [
        Rewriting(
            "write the end token behind each text before it is padded",
            'batch["input_ids"][:, -1] = torch.tensor([11, 12, 13, 14])\n',
            'batch["input_ids"][:2, 8], batch["input_ids"][2:, -1] = 2, 2\n',
        ),
    ],
    "LORA376": [
        Rewriting("load the base with 2 labels (num_labels)", "num_labels=1", "num_labels=2", "score"),
        Rewriting("give labels as floats", "torch.arange(4) % 2", "torch.arange(4) % 2.0"),
    ],
    "LORA377": [
        Rewriting("leave position_ids out of the batch", _POSITIONS, ""),
        Rewriting("make them with its own get_rope_index and keep all three", _POSITIONS, _OWN_POSITIONS),
    ],
    "LORA378": [
        Rewriting("keep do_rescale and do_normalize on", "pixels.float()", "(pixels / 255 - 0.48) / 0.27"),
    ],
    "LORA379": [
        Rewriting("drop such pairs", "report =", f"{_DIFFERENT}report ="),
    ],
    "LORA381": [
        Rewriting(
            "cut or divide the texts",
            "report = check_training(model, batch)",
            "batch = {n: v[:, :12] for n, v in batch.items()}\nreport = check_training(model, batch)",
        ),
        Rewriting(
            "rope_parameters of the type 'yarn' or 'linear'",
            "model.config.max_position_embeddings = 12",
            "model.config.max_position_embeddings = 12\n"
            'model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0}',
        ),
    ],
    "LORA382": [
        Rewriting(
            "leave the begin token that a chat template writes where it is",
            "report = check_training(model, batch)",
            'batch["input_ids"][:, 0] = batch["labels"][:, 0] = 2\nreport = check_training(model, batch)',
        ),
    ],
    "LORA384": [
        Rewriting(
            "pad and cut input_ids, labels and attention_mask together",
            'batch["attention_mask"] = batch["attention_mask"][:, :12]',
            "batch = {name: values[:, :12] for name, values in batch.items()}",
        ),
    ],
    "LORA385": [
        Rewriting(
            "call initialize_lora_eva_weights(model, dataloader) behind get_peft_model",
            "report = check_training(model, batch",
            "from peft import initialize_lora_eva_weights\n"
            'texts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}\n'
            "initialize_lora_eva_weights(model, [texts] * 4, show_progress_bar=False)\n"
            "report = check_training(model, batch",
        ),
        Rewriting("leave init_lora_weights out", 'init_lora_weights="eva", eva_config=EvaConfig()', ""),
    ],
    "LORA386": [
        Rewriting(
            "hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]",
            "last = states[:, -1]",
            'last = states[torch.arange(len(states)), batch["attention_mask"].sum(1) - 1]',
        ),
        Rewriting(
            "multiply what each token gives by attention_mask, and divide by its sum",
            "last = states[:, -1]",
            'mask = batch["attention_mask"]\n'
            "    last = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
        ),
    ],
    "LORA387": [
        Rewriting(
            "with torch.no_grad(), model.disable_adapter():",
            "with torch.no_grad():",
            "with torch.no_grad(), model.disable_adapter():",
        ),
    ],
    "LORA388": [Rewriting("predictions.squeeze(-1)", "[:, -1, :1]", "[:, -1, :1].squeeze(-1)")],
    "LORA389": [
        Rewriting("add_generation_prompt=False", "for start in (3, 13):", "for start in (3,):"),
    ],
    "LORA391": [
        Rewriting("a group of the optimizer with weight_decay=0.0", "weight_decay=0.1", "weight_decay=0.0"),
        Rewriting(
            "train the new rows alone with trainable_token_indices",
            'modules_to_save=["embed_tokens"])\n'
            "model = get_peft_model(base, config)\n"
            "table = model.get_input_embeddings().weight\n"
            "new = torch.zeros(len(table), 1)\n"
            'new[batch["input_ids"][0, 0]] = 1\n'
            "table.register_hook(lambda gradient: gradient * new)\n",
            'trainable_token_indices=[int(batch["input_ids"][0, 0])])\nmodel = get_peft_model(base, config)\n',
        ),
    ],
    "LORA446": [
        Rewriting("save the trained adapter again in float32", ".half()", ".float()"),
        Rewriting("or bfloat16", ".half()", ".bfloat16()"),
    ],
}
"""The ways of the fix of each rule, on its example."""
