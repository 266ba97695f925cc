from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.facts.recipe_lines import UnknownKey
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import at


@rule("LORA603", severity="warning", needs=RecipeFacts)
def key_is_not_known(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """Nothing reads a key of the recipe.

    ## What it does
    Compares the keys with those of the tool, read from its sources: misspelt ones, those of another tool or of an
    older version, keys that it reads under another method alone, and nested blocks where the tool reads a flat file.
    Keys of plugins that the recipe names are known. With several keys that TRL never had, a recipe is taken for one
    of a script that reads more than TRL does, and no key of it is unknown.

    ## Why is this bad?
    Axolotl drops keys that it does not know without a word, and so do TRL's scripts; the setting has its default
    instead. LLaMA-Factory, ms-swift and the `trl` command stop.

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
    gradient_checkpoint: true
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
    - Axolotl's keys: https://docs.axolotl.ai/docs/config-reference.html
    - LLaMA-Factory's: https://github.com/hiyouga/LLaMA-Factory/tree/main/src/llamafactory/hparams
    - TRL's: https://huggingface.co/docs/trl/clis
    """
    for one in facts.unknown:
        effect = (
            f"{facts.tool} stops at it"
            if one.stops
            else f"{facts.tool} ignores it, and its setting never happens"
        )
        value = one.text.partition(":")[2]
        mended = f"write `{one.meant}:{value}` in its place" if one.meant else f"remove `{one.text}`"
        yield Violation(
            at(facts, one.line, one.key),
            f"`{one.key}` {_said(one)}: {effect}",
            f"a key that {facts.tool} reads",
            mended,
            "error" if one.stops or one.kind == "block" else None,
            one.line,
        )


def _said(one: UnknownKey) -> str:
    if one.kind == "dropped" and one.since:
        return f"is read {one.since}"
    if one.kind == "dropped":
        return "is dropped on the way to where it would be read"
    if one.kind == "removed":
        return f"is not known any more: removed in {one.since}"
    if one.kind == "block":
        return "is a nested block, and is no known key: the keys in it are not read"
    meant = f"; did you mean `{one.meant}`?" if one.meant else ""
    return f"is not a known key{meant}"
