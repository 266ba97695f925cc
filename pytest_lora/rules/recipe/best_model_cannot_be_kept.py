from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA622", severity="error", needs=RecipeFacts)
def best_model_cannot_be_kept(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The best model is to be kept, and evaluation and saving do not go together.

    ## What it does
    Looks for `load_best_model_at_end` where nothing is evaluated, where saving and evaluating follow different
    strategies, or where `save_steps` is no multiple of `eval_steps`.

    ## Why is this bad?
    `TrainingArguments` raises a ValueError before training starts.

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
    val_size: 0.1
    eval_strategy: steps
    eval_steps: 100
    save_steps: 150
    load_best_model_at_end: true
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
    val_size: 0.1
    eval_strategy: steps
    eval_steps: 100
    save_steps: 200
    load_best_model_at_end: true
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
    """
    setting = facts.setting
    if (
        setting is None
        or not setting.load_best_model_at_end.value
        or not setting.load_best_model_at_end.stated
    ):
        return
    best, every, saved = setting.load_best_model_at_end, setting.eval_steps, setting.save_steps
    evaluates, saves = setting.eval_strategy.value, setting.save_strategy.value
    if evaluates == "no" and setting.tool in ("LLaMA-Factory", "TRL"):
        said, mend = (
            "nothing is evaluated (`eval_strategy` is no)",
            "write `eval_strategy: steps`",
        )
    elif evaluates in ("steps", "epoch") and saves in ("steps", "epoch") and evaluates != saves:
        said = f"`eval_strategy` is {evaluates} and `save_strategy` is {saves}"
        mend = f"write `save_strategy: {evaluates}`"
    elif every.value and saved.value and every.value >= 1 and saved.value >= 1 and saved.value % every.value:
        said = f"`save_steps` {saved.value:g} is no multiple of `eval_steps` {every.value:g}"
        mend = f"write `save_steps: {every.value * max(1, round(saved.value / every.value)):g}`"
    else:
        return
    yield about(
        facts,
        best,
        f"`load_best_model_at_end` is on and {said}: the run stops at its start",
        "checkpoints where there is an evaluation, so that save_steps is a multiple of eval_steps",
        mend,
    )
