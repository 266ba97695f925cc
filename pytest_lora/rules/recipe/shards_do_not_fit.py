from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA650", severity="error", needs=RecipeFacts)
def shards_do_not_fit(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The weights do not fit the cards even when they are divided among them.

    ## What it does
    Divides the bytes of the base's weights by the number of cards, where FSDP or ZeRO-3 does so, and compares that with
    the memory of one. It is a lower bound: adapters, activations and gathered layers come on top.

    ## Why is this bad?
    Loading runs out of memory.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: meta-llama/Llama-3.1-70B
    adapter: lora
    lora_r: 16
    lora_alpha: 32
    lora_target_linear: true
    datasets:
      - path: data/train.jsonl
        type: alpaca
    sequence_len: 1024
    micro_batch_size: 1
    gradient_accumulation_steps: 8
    num_epochs: 2
    learning_rate: 0.0002
    gradient_checkpointing: true
    attn_implementation: sdpa
    fsdp_config:
      fsdp_version: 2
    ''')
    report = check_recipe(recipe, budget="24GiB", gpus=4)
    ```

    ## Use instead
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: meta-llama/Llama-3.1-70B
    adapter: lora
    lora_r: 16
    lora_alpha: 32
    lora_target_linear: true
    datasets:
      - path: data/train.jsonl
        type: alpaca
    sequence_len: 1024
    micro_batch_size: 1
    gradient_accumulation_steps: 8
    num_epochs: 2
    learning_rate: 0.0002
    gradient_checkpointing: true
    attn_implementation: sdpa
    fsdp_config:
      fsdp_version: 2
    ''')
    report = check_recipe(recipe, budget="80GiB", gpus=8)
    ```

    ## References
    - ZeRO, section 5: https://arxiv.org/abs/1910.02054
    """
    shard = facts.shard
    if shard is None or facts.setting is None or shard.fits:
        return
    part = shard.weights / shard.gpus
    enough = -(-2 * shard.weights // shard.budget)
    yield about(
        facts,
        facts.setting.strategy,
        f"the weights take {shard.weights / 2**30:.1f} GiB, {part / 2**30:.1f} GiB on each of "
        f"{shard.gpus} cards, more than "
        f"the {shard.budget / 2**30:.1f} GiB of memory of one: they do not fit",
        "weights that fit the cards with room for the step",
        f"take {enough} cards or more (`gpus={enough}`), which leaves half of each for the step, "
        "or quantize the base to 4 bits",
    )
