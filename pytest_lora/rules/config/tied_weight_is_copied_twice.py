from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA137", severity="info", needs=ConfigFacts)
def tied_weight_is_copied_twice(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """Both sides of a tied weight are saved in full, so that PEFT trains two copies of it.

    ## What it does
    Looks for `modules_to_save` that name every module of a tied weight (`embed_tokens` and `lm_head`) without
    `ensure_weight_tying`.

    ## Why is this bad?
    It is not, if the two are to differ. PEFT makes a copy of the weight for each; they train apart, both are saved, and
    a merged model is no longer tied: it is larger than the base by that weight, and PEFT sets `tie_word_embeddings` to
    False. With `ensure_weight_tying=True` both sides train one copy.

    ## Example
    ```python
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    report = check_config(config, tied_base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], trainable_token_indices=[126, 127])
    report = check_config(config, tied_base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2777
    - https://github.com/huggingface/peft/issues/2864
    """
    if facts.settings.ensure_weight_tying:
        return
    sizes = {module.name: module.in_features * module.out_features for module in facts.base.modules}
    for group in facts.base.tied:
        if all(name in facts.saved_modules for name in group):
            yield Violation(
                where=", ".join(group),
                observed=f"{' and '.join(group)} share one weight, and PEFT trains a copy for each (modules_to_save): "
                f"{sizes.get(group[0], 0):,} numbers {len(group)} times, which come apart and stay apart after a merge",
                expected="one copy, or two that are meant to differ",
                fix=advise(
                    change("set", ensure_weight_tying=True),
                    " (newer PEFT) for one copy; nothing, if they are to differ",
                ),
            )
