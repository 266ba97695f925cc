from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import at


@rule("LORA605", severity="error", needs=RecipeFacts)
def settings_exclude_each_other(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """Two settings of a recipe do not go together, or one does not go without another.

    ## What it does
    Looks for pairs of keys that the tool refuses, as its own checks say: `evals_per_epoch` beside `eval_steps` in
    Axolotl, `pissa_init` beside `quantization_bit` in LLaMA-Factory, 8-bit weights under ZeRO-3 there, `fp16` beside
    `bf16`. And for keys that it refuses alone, such as an `eval_strategy` with nothing to evaluate on.

    ## Why is this bad?
    The run stops when it begins, often after a wait for its GPUs. Where a tool takes both, one of them does not
    happen, and that is a warning.

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
    val_set_size: 0.05
    evals_per_epoch: 4
    eval_steps: 50
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
    val_set_size: 0.05
    eval_steps: 50
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - Axolotl's options: https://docs.axolotl.ai/docs/config-reference.html
    - TrainingArguments: https://huggingface.co/docs/transformers/main_classes/trainer
    """
    for clash in facts.clashes:
        if clash.needed:
            others = " or ".join(f"`{name}`" for name in clash.needed)
            yield Violation(
                at(facts, clash.line, clash.key),
                f"`{clash.key}` stands without {others}: {clash.why}",
                f"{others} beside `{clash.key}`",
                f"add {others}, or remove `{clash.key}`",
                None,
                clash.line,
            )
            continue
        yield Violation(
            at(facts, clash.line, clash.key),
            f"`{clash.key}` stands beside `{clash.other}`: {clash.why}",
            f"one of `{clash.key}` and `{clash.other}`",
            f"remove `{clash.key}`, or `{clash.other}`",
            None if clash.stops else "warning",
            clash.line,
        )
