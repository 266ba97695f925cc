from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import at


@rule("LORA602", severity="warning", needs=RecipeFacts)
def key_is_given_twice(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """A key stands twice, and the last one counts.

    ## What it does
    Compares the keys of each mapping. A key that `<<` brings in and the mapping overrides is none of these.

    ## Why is this bad?
    YAML loaders keep the last without a word, so that the line that a reader sees first is not what runs.

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
    lora_r: 8
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
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - YAML 1.1 wants keys to be unique: https://yaml.org/spec/1.1/#id932806
    """
    for one in facts.repeated:
        yield Violation(
            at(facts, one.last, one.key),
            f"`{one.key}` stands twice: `{one.first_text}` on line {one.first}, and again "
            f"`{one.last_text}` on line "
            f"{one.last}, which wins",
            "each key once",
            f"keep one of the two lines, `{one.first_text}` or `{one.last_text}`",
            line=one.last,
        )
