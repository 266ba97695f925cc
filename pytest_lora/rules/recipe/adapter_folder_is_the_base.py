from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA640", severity="error", needs=RecipeFacts)
def adapter_folder_is_the_base(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The base of the recipe is the folder of an adapter.

    ## What it does
    Looks into the folder that the recipe names as its base: `adapter_config.json` and no `config.json`.

    ## Why is this bad?
    The folder holds no model: loading raises, or PEFT's integration loads base and adapter together, and a second
    adapter is put upon the first.

    ## Example
    ```python
    from pathlib import Path

    Path("round-one").mkdir(exist_ok=True)
    Path("round-one/adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}'
    )
    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: round-one
    adapter: lora
    lora_r: 16
    lora_alpha: 32
    lora_target_linear: true
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
        '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}'
    )
    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    lora_model_dir: round-one
    lora_r: 8
    lora_alpha: 16
    lora_target_linear: true
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
    - https://huggingface.co/docs/peft/tutorial/peft_integrations
    """
    found = facts.base_is_adapter
    if found is None or facts.setting is None:
        return
    named = found.base or "the base that the adapter was trained on"
    key = _CONTINUES.get(facts.setting.tool, "the key for the adapter to go on from")
    rank = facts.setting.r
    other = found.r is not None and rank.stated and rank.value != found.r
    lines = f"`{facts.setting.base.key}: {named}` and `{key}: {found.path}`"
    yield about(
        facts,
        facts.setting.base,
        f"`{facts.setting.base.key}: {found.path}` is the folder of an adapter, not of a base model",
        "the base model, and the adapter beside it",
        f"write {lines}" + (f", and `{rank.key}: {found.r}`, its rank" if other else ""),
    )


_CONTINUES = {"Axolotl": "lora_model_dir", "LLaMA-Factory": "adapter_name_or_path", "ms-swift": "adapters"}
