from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA641", severity="warning", needs=RecipeFacts)
def continued_adapter_has_another_rank(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """Training goes on from an adapter of another rank.

    ## What it does
    Compares the rank of the recipe with that of the adapter folder that it goes on from.

    ## Why is this bad?
    The shapes of an adapter are fixed when it is made: the tool takes the rank of the folder and ignores that of the
    recipe, or raises at tensors that do not fit.

    ## Example
    ```python
    from pathlib import Path

    Path("round-one").mkdir(exist_ok=True)
    Path("round-one/adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}'
    )
    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    lora_model_dir: round-one
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

    ## Use instead
    ```python
    from pathlib import Path

    Path("round-one").mkdir(exist_ok=True)
    Path("round-one/adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}'
    )
    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    lora_model_dir: round-one
    lora_r: 8
    lora_alpha: 16
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
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    found = facts.continued
    if found is None or facts.setting is None or found.r is None or not facts.setting.r.stated:
        return
    rank = facts.setting.r
    if rank.value is not None and rank.value != found.r:
        yield about(
            facts,
            rank,
            f"`{rank.key}: {rank.value}`, and the adapter in {found.path} that training goes on "
            f"from has rank {found.r}",
            "the rank of the adapter",
            f"write `{rank.key}: {found.r}`, or start without `{facts.setting.continues.key}`",
        )
