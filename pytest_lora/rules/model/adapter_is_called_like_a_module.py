from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA245", severity="error", needs=ModelFacts)
def adapter_is_called_like_a_module(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The name of an adapter is also a part of the names of modules.

    ## What it does
    Looks for adapters that are called like a part of a module's path (`q_proj`, `layers`, `0`) or like the prefix of
    PEFT's factors (`lora`, `lora_A`), and asks PEFT what it would save. It is a warning where no key is lost.
    X-LoRA saves its classifier alone, so that the names of its adapters are free.

    ## Why is this bad?
    PEFT finds the tensors of an adapter by its name among the parts of their keys. A name that stands there
    anyway makes it leave out tensors of the other adapters, or take a part of the path for the name: a file
    without them, which loads without a word.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), adapter_name="q_proj")
    model.add_adapter("second", LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.trains_xlora:
        return
    for name in facts.colliding:
        observed = f"the name of adapter {name.adapter!r} is also a part of keys ({name.part})"
        if name.lost:
            observed += (
                f": saving leaves out or spoils {len(name.lost)} keys of {', '.join(map(repr, name.adapters))}, such "
                f"as {name.lost[0][:120]}"
            )
        yield Violation(
            where=f"adapter {name.adapter!r}",
            observed=observed,
            expected="a name that no module and no factor has",
            fix="give the adapter a name of its own before it is trained and saved, such as "
            "get_peft_model(..., adapter_name='adapter_1')",
            severity=None if name.lost else "warning",
        )
