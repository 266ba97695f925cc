from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA625", severity="warning", needs=RecipeFacts)
def loss_is_on_prompts(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The loss is taken on the user's turns too.

    ## What it does
    Looks into a data file beside the recipe: where it holds conversations and the recipe of TRL has neither
    `assistant_only_loss` nor `completion_only_loss`, every token is a label.

    ## Why is this bad?
    The adapter learns to write questions and system prompts as much as answers, which is seldom meant.

    ## Example
    ```python
    from pathlib import Path

    Path("data").mkdir(exist_ok=True)
    Path("data/train.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Open?"}, {"role": "assistant", "content": "Yes."}]}'
    )
    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: Qwen/Qwen2.5-0.5B
    dtype: bfloat16
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    datasets:
      - path: json
        data_files: data/train.jsonl
    learning_rate: 2.0e-4
    ''')
    report = check_recipe(recipe)
    ```

    ## Use instead
    ```python
    from pathlib import Path

    Path("data").mkdir(exist_ok=True)
    Path("data/train.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Open?"}, {"role": "assistant", "content": "Yes."}]}'
    )
    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: Qwen/Qwen2.5-0.5B
    dtype: bfloat16
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    assistant_only_loss: true
    datasets:
      - path: json
        data_files: data/train.jsonl
    learning_rate: 2.0e-4
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - TRL, training on assistant messages only: https://huggingface.co/docs/trl/sft_trainer
    """
    setting = facts.setting
    if setting is None or facts.conversational is None or setting.loss_on.value != "all tokens":
        return
    yield about(
        facts,
        setting.loss_on,
        f"{facts.conversational} holds conversations, and the loss is on every token, the "
        "user's turns and system prompts "
        f"included ({setting.loss_on.source})",
        "a loss on the answers of the assistant",
        "add `assistant_only_loss: true`",
    )
