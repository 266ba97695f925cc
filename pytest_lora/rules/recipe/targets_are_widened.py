from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA630", severity="warning", needs=RecipeFacts)
def targets_are_widened(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The recipe names some modules, and all linear modules get an adapter.

    ## What it does
    Looks for `lora_target_modules` beside `lora_target_linear: true`, which Axolotl unites, where the names are fewer
    than the linear modules of the base.

    ## Why is this bad?
    The adapter has several times the parameters that the list says.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    lora_r: 16
    lora_alpha: 32
    lora_target_linear: true
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

    ## Use instead
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    lora_r: 16
    lora_alpha: 32
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
    - Axolotl, `lora_target_linear`: https://docs.axolotl.ai/docs/config-reference.html
    """
    setting = facts.setting
    if setting is None or not facts.widened:
        return
    yield about(
        facts,
        setting.target_modules,
        f"`lora_target_modules` names {', '.join(facts.widened)}, and `lora_target_linear: "
        "true` adds every linear module: "
        "the two are united",
        "one of the two",
        "remove `lora_target_linear: true`, or `lora_target_modules`",
    )
