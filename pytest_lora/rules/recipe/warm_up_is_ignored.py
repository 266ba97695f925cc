from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA613", severity="warning", needs=RecipeFacts)
def warm_up_is_ignored(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The schedule takes no warm-up.

    ## What it does
    Looks for `constant`, which has no warm-up, beside `warmup_steps` or `warmup_ratio`.

    ## Why is this bad?
    The run starts at the full rate, which the warm-up was to prevent; nothing says so.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: Qwen/Qwen2.5-0.5B
    stage: sft
    do_train: true
    finetuning_type: lora
    lora_target: all
    dataset: tickets
    template: qwen
    learning_rate: 1.0e-4
    bf16: true
    lr_scheduler_type: constant
    warmup_ratio: 0.1
    ''')
    report = check_recipe(recipe)
    ```

    ## Use instead
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: Qwen/Qwen2.5-0.5B
    stage: sft
    do_train: true
    finetuning_type: lora
    lora_target: all
    dataset: tickets
    template: qwen
    learning_rate: 1.0e-4
    bf16: true
    lr_scheduler_type: constant_with_warmup
    warmup_ratio: 0.1
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main_classes/optimizer_schedules
    """
    setting = facts.setting
    if setting is None or setting.schedule.value != "constant":
        return
    for warm_up in (setting.warmup_steps, setting.warmup_ratio):
        if warm_up.stated and warm_up.value:
            yield about(
                facts,
                warm_up,
                f"`{setting.schedule.key}: constant` takes no warm-up: `{warm_up.key}: "
                f"{warm_up.value:g}` has no effect",
                "a schedule that warms up, or no warm-up",
                f"write `{setting.schedule.key}: constant_with_warmup`",
            )
