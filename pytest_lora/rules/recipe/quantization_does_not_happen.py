from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA610", severity="error", needs=RecipeFacts)
def quantization_does_not_happen(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The recipe asks for a quantized base, and the base is not quantized.

    ## What it does
    Compares what is asked with what the tool does: Axolotl quantizes to 4 bits only under `adapter: qlora`,
    LLaMA-Factory only where `quantization_bit` says to how many bits, by a method that it knows, ms-swift only where
    `quant_method` and `quant_bits` stand together.

    ## Why is this bad?
    The base is loaded whole, four times as large as meant: it does not fit the card, or the run is not the QLoRA
    run that it is taken for.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    load_in_4bit: true
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

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: qlora
    load_in_4bit: true
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
    - QLoRA: https://arxiv.org/abs/2305.14314
    - Axolotl, `adapter`: https://docs.axolotl.ai/docs/config-reference.html
    """
    if facts.setting is None or facts.setting.quantization.asked is None:
        return
    found = facts.setting.quantization
    yield about(
        facts,
        found,
        f"the recipe asks for {found.asked}, and nothing is quantized: {found.why}",
        "a base that is quantized as asked",
        _MENDS.get((facts.setting.tool, found.key), "set both the method and the number of bits"),
    )


_MENDS = {
    ("Axolotl", "load_in_4bit"): "write `adapter: qlora` and `load_in_4bit: true`",
    ("LLaMA-Factory", "quantization_bit"): "write `quantization_bit: 4`",
    ("LLaMA-Factory", "quantization_method"): "write `quantization_method: bnb`",
    ("ms-swift", "quant_bits"): "write `quant_method: bnb` and `quant_bits: 4`",
}
