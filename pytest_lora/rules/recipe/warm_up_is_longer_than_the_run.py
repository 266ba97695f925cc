from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA620", severity="error", needs=RecipeFacts)
def warm_up_is_longer_than_the_run(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The warm-up takes as many steps as the run, or more.

    ## What it does
    Compares `warmup_steps` with `max_steps`, and looks for a `warmup_ratio` of 1 or more.

    ## Why is this bad?
    The rate never reaches what was set, and the decay never comes.

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
    max_steps: 60
    warmup_steps: 100
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
    max_steps: 600
    warmup_steps: 30
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main_classes/optimizer_schedules
    """
    setting = facts.setting
    if setting is None:
        return
    steps, ratio, limit = setting.warmup_steps, setting.warmup_ratio, setting.max_steps
    if limit.value and steps.value and steps.value >= limit.value > 0:
        yield about(
            facts,
            steps,
            f"the warm-up takes {steps.value:g} steps and the run ends after {limit.value} "
            f"(`{limit.key}`): the rate never "
            "reaches what was set",
            "a warm-up over 3 to 10 % of the optimizer steps",
            f"write `{steps.key}: {max(1, limit.value // 20)}`",
        )._replace(severity=None if limit.value >= TRIED_OUT else "info")
    elif ratio.value and ratio.value >= 1 and not steps.value:
        yield about(
            facts,
            ratio,
            f"a warm-up of {ratio.value:g} times the run never ends; `{ratio.key}` is a share of all steps",
            "a warm-up over 3 to 10 % of the optimizer steps",
            f"write `{ratio.key}: 0.05`",
        )


TRIED_OUT = 20
"""Training steps below which a run is a trial of its recipe."""
