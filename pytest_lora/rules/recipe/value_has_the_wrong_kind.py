from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import at


@rule("LORA604", severity="warning", needs=RecipeFacts)
def value_has_the_wrong_kind(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """A value is not of the kind that its key takes.

    ## What it does
    Looks for numbers that YAML reads as text (`1e-4` where the script takes it as it is, `0,0002`), for words that
    it reads as booleans (`eval_strategy: no`), for paths that begin with `~`, which nobody expands, and for words
    that are none of those that the tool takes (`dtype: bf16` in TRL).

    ## Why is this bad?
    The run raises where text is compared with a number, or where a strategy is false; a path with `~` is looked
    for in a folder of that name, or on the hub.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    lora_r: 16
    lora_alpha: 32
    target_modules: [q_proj, v_proj]
    learning_rate: 1e-4
    ''')
    report = check_recipe(recipe)
    ```

    ## Use instead
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    base_model: Qwen/Qwen2.5-0.5B
    lora_r: 16
    lora_alpha: 32
    target_modules: [q_proj, v_proj]
    learning_rate: 1.0e-4
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - YAML 1.1, floats: https://yaml.org/type/float.html
    - YAML 1.1, booleans: https://yaml.org/type/bool.html
    """
    for one in facts.wrong:
        is_word = one.wanted == "a word" or one.wanted.startswith("one of ")
        yield Violation(
            at(facts, one.line, one.key),
            f"`{one.key}: {one.written}` is {one.became}",
            one.wanted,
            f"write `{one.key}: {one.mended}`"
            if one.mended
            else f"write one of these words after `{one.key}:`",
            "error" if one.stops and is_word else None,
            one.line,
        )
