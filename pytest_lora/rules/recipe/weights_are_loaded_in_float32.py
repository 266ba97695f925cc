from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA612", severity="warning", needs=RecipeFacts)
def weights_are_loaded_in_float32(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The base is loaded in float32 because the recipe does not say otherwise.

    ## What it does
    Looks for a recipe that names no dtype where the tool's default is float32, on a base of a billion parameters or
    more that is stored in 16 bits.

    ## Why is this bad?
    The weights take twice the memory, and nothing is gained: the checkpoint has 16 bits only.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: meta-llama/Llama-3.2-1B
    use_peft: true
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
    model_name_or_path: meta-llama/Llama-3.2-1B
    dtype: bfloat16
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    dataset_name: data/intents
    learning_rate: 2.0e-4
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - TRL, `dtype` of ModelConfig: https://huggingface.co/docs/trl/clis
    """
    setting, base = facts.setting, facts.base
    if setting is None or base is None or setting.dtype.stated or setting.dtype.value != "float32":
        return
    if not setting.dtype.source.startswith("default") or base.dtype == "float32" or base.parameters < LARGE:
        return
    yield about(
        facts,
        setting.dtype,
        f"no `dtype` is given, so that {setting.tool} loads {base.name} in float32 (its "
        "default), which is stored in "
        f"{base.dtype}: {base.parameters * 4 / 2**30:.1f} GiB of weights instead of "
        f"{base.parameters * 2 / 2**30:.1f}",
        "the dtype that the base is stored in",
        f"add `{setting.dtype.key}: {base.dtype}`",
    )


LARGE = 1_000_000_000
"""Parameters below which another two bytes each do not matter on any card."""
