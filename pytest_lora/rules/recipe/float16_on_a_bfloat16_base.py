from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA623", severity="warning", needs=RecipeFacts)
def float16_on_a_bfloat16_base(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The run computes in float16 on a base that was trained in bfloat16.

    ## What it does
    Compares `fp16` with the dtype that the base is stored in.

    ## Why is this bad?
    float16 ends at 65504, bfloat16 at 3e38: activations that the base learned with overflow to infinity, and the
    loss becomes NaN. Gemma 2 and 3 and T5 are known for it.

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
    bf16: false
    fp16: true
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
    bf16: true
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - https://huggingface.co/docs/transformers/model_doc/gemma2
    """
    setting, base = facts.setting, facts.base
    if setting is None or base is None or base.dtype != "bfloat16":
        return
    if setting.precision.value == "fp16" and setting.precision.stated:
        yield about(
            facts,
            setting.precision,
            f"`{setting.precision.key}` computes in float16, and {base.name} was trained and is "
            "stored in bfloat16, whose "
            "range float16 lacks",
            "bf16, on every card from Ampere (2020) on",
            "write `bf16: true` and `fp16: false`",
        )
