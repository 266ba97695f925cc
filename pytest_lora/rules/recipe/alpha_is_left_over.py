from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA633", severity="warning", needs=RecipeFacts)
def alpha_is_left_over(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The scaling comes from a default alpha that does not fit the rank.

    ## What it does
    Computes alpha / r where the recipe states the rank and the tool supplies alpha, 32 in TRL and ms-swift whatever
    the rank. A scaling of 1/4 or less, or of 16 or more, is outside of what is usual.

    ## Why is this bad?
    A higher rank then weakens the adapter, and a lower one blows it up, although the recipe only changes its size.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: meta-llama/Llama-3.2-1B
    dtype: bfloat16
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    dataset_name: data/intents
    learning_rate: 2.0e-4
    lora_r: 256
    ''')
    report = check_recipe(recipe)
    ```

    ## Use instead
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: meta-llama/Llama-3.2-1B
    dtype: bfloat16
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    dataset_name: data/intents
    learning_rate: 2.0e-4
    lora_r: 256
    lora_alpha: 256
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - LoRA, section 4.1: https://arxiv.org/abs/2106.09685
    - rsLoRA: https://arxiv.org/abs/2312.03732
    """
    setting = facts.setting
    if setting is None or setting.lora_alpha.stated or not setting.r.stated or setting.use_rslora.value:
        return
    scaling = setting.scaling
    if scaling is None or not setting.lora_alpha.source.startswith("default") or LOW < scaling < HIGH:
        return
    yield about(
        facts,
        setting.r,
        f"`{setting.r.key}: {setting.r.value}` with an alpha of {setting.lora_alpha.value:g} "
        f"({setting.lora_alpha.source}) "
        f"has a scaling of {scaling:g}",
        "an alpha of one or two times the rank",
        f"add `{setting.lora_alpha.key}: {setting.r.value}`",
    )


LOW, HIGH = 1 / 4, 16.0
"""QLoRA (arXiv:2305.14314) has 1/4 at rank 64 on purpose and states it; LoRA (arXiv:2106.09685) 1 to 8."""
