from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import at


@rule("LORA601", severity="error", needs=RecipeFacts)
def recipe_is_no_yaml(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The file is no YAML that a tool could load.

    ## What it does
    Reads the file with bounds on its size, depth and aliases, and stops where it is no YAML: a tab in the
    indentation, a bracket that is never closed, a tag that asks for a Python object, aliases that multiply.

    ## Why is this bad?
    The tool raises before anything is loaded, or a file made to harm is expanded until memory is full.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    adapter: lora
    lora_r: [16
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
    - YAML 1.1, on indentation: https://yaml.org/spec/1.1/#id871998
    """
    flaw = facts.flaw
    if flaw is None:
        return
    tabbed = flaw.kind == "tab"
    observed = f"line {flaw.line} cannot be read: {flaw.message}"
    yield Violation(
        at(facts, flaw.line),
        f"line {flaw.line} has a tab character where YAML wants spaces: {flaw.message}"
        if tabbed
        else observed,
        "a file that a YAML parser reads",
        _MENDS[flaw.kind],
        line=flaw.line,
    )


_MENDS = {
    "syntax": "mend the line, or the one before it: a quote or bracket that is open, or a colon without a space",
    "tab": "indent with spaces instead of the tab",
    "limit": "keep recipes small and flat; a recipe needs a few kilobytes and few aliases",
    "tag": "write the value as plain YAML; safe loaders make no objects",
    "unreadable": "give the path of a file that can be read",
}
