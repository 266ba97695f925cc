from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA624", severity="warning", needs=RecipeFacts)
def packing_mixes_samples(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """Packed samples attend to each other.

    ## What it does
    Looks for packing where nothing keeps the samples of a row apart: in Axolotl without an attention backend, in
    TRL without flash attention, in LLaMA-Factory without `neat_packing`.

    ## Why is this bad?
    A token sees the samples before its own, and learns from text that has nothing to do with it.

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
    sample_packing: true
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
    attn_implementation: flash_attention_2
    sample_packing: true
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - Axolotl on multipack: https://docs.axolotl.ai/docs/multipack.html
    - TRL on packing: https://huggingface.co/docs/trl/reducing_memory_usage
    """
    setting = facts.setting
    if setting is None or not setting.packing.value or not setting.packing.stated:
        return
    attention = str(setting.attention.value or "")
    if setting.tool == "Axolotl" and not attention:
        mend = "add `attn_implementation: flash_attention_2`"
    elif setting.tool in ("TRL", "ms-swift") and "flash" not in attention:
        key = setting.attention.key or "attn_implementation"
        mend = f"write `{key}: {'flash_attention_2' if setting.tool == 'TRL' else 'flash_attn'}`, or `packing: false`"
    elif (
        setting.tool == "LLaMA-Factory"
        and setting.objective.value == "sft"
        and setting.packing.value != "separate"
    ):
        mend = "add `neat_packing: true`"
    else:
        return
    backend = f"{attention} attention" if attention else "no attention backend (none is named)"
    yield about(
        facts,
        setting.packing,
        f"`{setting.packing.key}` packs samples into one row, and with {backend} nothing keeps "
        "them apart: they attend to each "
        "other, a cross-contamination",
        "packing with flash attention, which separates samples",
        mend,
    )
