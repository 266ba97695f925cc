from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts, SavedModule
from pytest_lora.facts.settings import is_named
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import tied_as_one, without


@rule("LORA213", severity="error", needs=ModelFacts)
def tied_weight_is_trained_on_one_side(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Tied weights have come apart: one side trains a copy, the other keeps the old tensor.

    ## What it does
    Looks for `modules_to_save` copies of a module that shares its weight with another one which does not
    use the copy. Both sides saved in full are fine, but for a merge under transformers before 5, which ties them again
    when the merged model is loaded.

    ## Why is this bad?
    With tied embeddings, `embed_tokens` and `lm_head` are one tensor. If only one of them trains a copy,
    new tokens are understood but never produced, or the reverse; and a merge ties them again and throws one
    away.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(tied_base, config)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(base, config)
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2864
    - https://github.com/huggingface/peft/issues/2803
    """
    owned = {(copy.module, copy.adapter) for copy in facts.saved}
    for copy in facts.saved:
        alone = [name for name in copy.tied if (name, copy.adapter) not in owned]
        lost_in_merge = expect.will_merge and copy.tied and copy.tied_by_loading
        if copy.active and copy.trainable and (alone or lost_in_merge):
            others = ", ".join(alone or copy.tied)
            yield Violation(
                where=f"{copy.module}, tied to {others}",
                observed=f"{copy.module} trains its own copy (modules_to_save), {others} "
                + (
                    "keeps the old shared weight"
                    if alone
                    else "another one; the merged model ties them as it is loaded"
                ),
                expected="tied modules to train one shared weight",
                fix=_fix(copy, facts),
                severity=None if alone else "warning",
            )


def _fix(copy: SavedModule, facts: ModelFacts) -> Advice:
    config = facts.config_of(copy.adapter)
    saved = config.settings.modules_to_save if config else ()
    tied = (copy.module, *copy.tied)
    rest = without(saved, *(name for name in saved for module in tied if is_named(module, name)))
    left_out = advise(
        "leave them out: ", change(modules_to_save=rest), ", with trainable_token_indices for new rows"
    )
    way = config and tied_as_one(config, "modules_to_save", [copy.module])
    return advise(way, " (newer PEFT), or ", left_out) if way else left_out
