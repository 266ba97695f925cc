from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts, RunSetting, SavedAdapter, Value
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about

_ATTENTION = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn"))
"""Names of modules of attention: a folder that has no others adapts fewer than all linear modules."""


@rule("LORA642", severity="warning", needs=RecipeFacts)
def continued_adapter_is_another(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """Training goes on from an adapter that is not the one that the recipe describes.

    ## What it does
    Compares what the recipe states (targets, alpha, full modules, rsLoRA, DoRA) with `adapter_config.json` of the
    folder that it goes on from. A folder of another method, or of a base of other sizes, is an error. The rank has a
    rule of its own (LORA641).

    ## Why is this bad?
    The configuration of the folder governs, and these lines of the recipe change nothing. Axolotl (`lora_model_dir`),
    LLaMA-Factory (`adapter_name_or_path` without `create_new_adapter`) and ms-swift (`adapters`) load it by
    `from_pretrained(model, folder, is_trainable=True)`; of these lines, Axolotl warns of patterns alone. An adapter
    of a base of other sizes does not load.

    ## Example
    ```python
    from pathlib import Path

    Path("round-one").mkdir(exist_ok=True)
    Path("round-one/adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}'
    )
    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    lora_model_dir: round-one
    lora_r: 8
    lora_alpha: 16
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    datasets:
      - path: data/train.jsonl
        type: alpaca
    sequence_len: 1024
    micro_batch_size: 2
    gradient_accumulation_steps: 8
    num_epochs: 2
    learning_rate: 0.0002
    gradient_checkpointing: true
    attn_implementation: sdpa
    ''')
    report = check_recipe(recipe)
    ```

    ## Use instead
    ```python
    from pathlib import Path

    Path("round-one").mkdir(exist_ok=True)
    Path("round-one/adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}'
    )
    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    lora_model_dir: round-one
    lora_r: 8
    lora_alpha: 16
    lora_target_modules: [q_proj, v_proj]
    datasets:
      - path: data/train.jsonl
        type: alpaca
    sequence_len: 1024
    micro_batch_size: 2
    gradient_accumulation_steps: 8
    num_epochs: 2
    learning_rate: 0.0002
    gradient_checkpointing: true
    attn_implementation: sdpa
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.from_pretrained
    - https://github.com/axolotl-ai-cloud/axolotl/blob/main/src/axolotl/loaders/adapter.py (load_lora)
    - https://github.com/hiyouga/LLaMA-Factory/blob/main/src/llamafactory/model/adapter.py
    - https://github.com/modelscope/ms-swift/blob/main/swift/pipelines/train/tuner.py
    """
    found, setting = facts.continued, facts.setting
    if found is None or setting is None:
        return
    start = f"or start without `{setting.continues.key}`"
    if found.kind not in (None, "LORA"):
        yield about(
            facts,
            setting.continues,
            f"the adapter in {found.path} is of another method ({found.kind}): it is trained, and no LoRA is made",
            "the folder of a LoRA adapter",
            f"name the folder of a LoRA adapter, {start}",
        )._replace(severity="error")
        return
    if found.same_shape is False:
        yield about(
            facts,
            setting.base,
            f"the adapter in {found.path} is for {found.base}; the base here, {setting.base.value}, has other sizes",
            "the base that the adapter was trained on",
            f"write `{setting.base.key}: {found.base}`, {start}",
        )._replace(severity="error")
        return
    for value, has in _differing(setting, found):
        yield about(
            facts,
            value,
            f"`{value.key}` says {_shown(value.value)}, and the adapter in {found.path} that training goes on from has "
            f"{_shown(has)}, which governs: this line changes nothing",
            "the same in both",
            f"write `{value.key}: {_shown(has)}`, {start}",
        )


def _differing(setting: RunSetting, found: SavedAdapter) -> Iterator[tuple[Value, Any]]:
    """What the recipe states otherwise than the folder, with what the folder has."""
    plain = (
        (setting.lora_alpha, found.alpha),
        (setting.use_rslora, found.use_rslora),
        (setting.use_dora, found.use_dora),
    )
    for value, has in plain:
        if value.stated and None not in (value.value, has) and value.value != has:
            yield value, has
    targets, saved = setting.target_modules, setting.modules_to_save
    if targets.stated and isinstance(found.targets, tuple):
        widened = targets.value == "all-linear" and _ATTENTION.issuperset(found.targets)
        listed = isinstance(targets.value, tuple) and set(targets.value) != set(found.targets)
        if widened or listed:
            yield targets, found.targets
    if saved.stated and isinstance(saved.value, tuple) and set(saved.value) != set(found.saved):
        yield saved, found.saved


def _shown(value: object) -> str:
    """A value as YAML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
