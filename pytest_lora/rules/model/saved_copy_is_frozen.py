from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA210", severity="error", needs=ModelFacts)
def saved_copy_is_frozen(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """A module in modules_to_save does not train while its adapter does.

    ## What it does
    Looks for frozen `modules_to_save` copies and token rows of adapters that are active and trainable.

    ## Why is this bad?
    The module was listed because it has to be learned, most often a new task head or new tokens. Frozen, it
    keeps its random values and the adapter learns around them.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    model.base_model.model.lm_head.modules_to_save["default"].requires_grad_(False)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    report = check_model(model)
    ```

    ## References
    - https://github.com/unslothai/unsloth/issues/3108
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.modules_to_save
    """
    training = [name for name in facts.training_adapters if name in facts.active]
    if expect.purpose != "train" or facts.disabled:
        return
    frozen = [part for part in facts.kept if part.active and not part.trainable and part.adapter in training]
    if frozen:
        first = frozen[0]
        kind = first.field
        yield Violation(
            where=grouped(part.module for part in frozen),
            observed=f"{first.module} is in {kind} of adapter {first.adapter!r} but frozen "
            "(requires_grad=False)",
            expected="every listed module trainable, like the adapter beside it",
            fix=f"call model.set_adapter({first.adapter!r}), which makes {kind} of that adapter trainable, too",
        )
