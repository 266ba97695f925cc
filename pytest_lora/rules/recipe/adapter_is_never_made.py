from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA611", severity="error", needs=RecipeFacts)
def adapter_is_never_made(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The recipe has keys of LoRA, and no adapter is made.

    ## What it does
    Looks for the switch that the LoRA keys need: `use_peft: true` in TRL, `adapter: lora` or `qlora` in Axolotl.

    ## Why is this bad?
    All weights are trained, with many times the memory, at a rate that is meant for an adapter.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: Qwen/Qwen2.5-0.5B
    dtype: bfloat16
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    dataset_name: data/intents
    learning_rate: 2.0e-4
    ''')
    report = check_recipe(recipe)
    ```

    ## Use instead
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: Qwen/Qwen2.5-0.5B
    dtype: bfloat16
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    dataset_name: data/intents
    learning_rate: 2.0e-4
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - TRL, `use_peft`: https://huggingface.co/docs/trl/clis
    - Axolotl, `adapter`: https://docs.axolotl.ai/docs/config-reference.html
    """
    if facts.setting is None or facts.setting.adapter.asked is None:
        return
    found = facts.setting.adapter
    switch = "use_peft: true" if found.key == "use_peft" else "adapter: lora"
    yield about(
        facts,
        found,
        f"`{found.asked}` is there and `{found.key}` is not on: {found.why}",
        "the switch beside the keys that need it",
        f"write `{switch}`, or remove the LoRA keys",
    )
