from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA120", severity="error", needs=ConfigFacts, on_saved="with_base")
def token_index_does_not_exist(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """trainable_token_indices names rows that the embedding does not have.

    ## What it does
    Compares `trainable_token_indices` with the size of the vocabulary.

    ## Why is this bad?
    PEFT raises a bare IndexError, or, for a negative number, trains a row that nobody meant.
    Usually the embeddings were not resized after tokens were added.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], trainable_token_indices=[128, 129])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], trainable_token_indices=[126, 127])
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/trainable_tokens
    """
    size = facts.base.vocab_size
    for module, rows in facts.settings.trainable_token_indices:
        lost = [row for row in rows if size is not None and not 0 <= row < size]
        if lost:
            yield Violation(
                where=f"trainable_token_indices{f'[{module!r}]' if module else ''} on {facts.base.architecture}",
                observed=f"{lost[:5]} are no rows of an embedding with {size} rows",
                expected=f"indices from 0 to {(size or 0) - 1}",
                fix=_fix(module, rows, lost, facts),
            )


def _fix(module: str, rows: tuple[int, ...], lost: list[int], facts: ConfigFacts) -> Advice:
    if min(lost) >= 0:
        return advise(
            f"for new tokens call base.resize_token_embeddings({max(lost) + 1}), the length of the tokenizer, before "
            "get_peft_model; else take the ids from the tokenizer"
        )
    kept = [row for row in rows if row not in lost]
    others = {name: found for name, found in facts.settings.trainable_token_indices if name != module}
    return advise(
        f"drop {lost[:5]}: ",
        change(trainable_token_indices={**others, module: kept} if module else tuple(kept)),
    )
