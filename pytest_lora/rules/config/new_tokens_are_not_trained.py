from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise_any
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import ways_to_train_rows


@rule("LORA119", severity="error", needs=ConfigFacts, on_saved="with_base")
def new_tokens_are_not_trained(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """Tokens were added to the vocabulary, but their embeddings stay at random.

    ## What it does
    Needs `Expect(new_tokens=n)`. Looks whether the input embedding, and an output head of its own, are
    trained: as `modules_to_save`, as LoRA targets, or by `trainable_token_indices` that cover the added
    rows.

    ## Why is this bad?
    The added rows are random. Frozen, they mean nothing to the model; with an untrained head they are
    understood but never produced.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base, expect=Expect(new_tokens=2))
    ```

    ## Use instead
    ```python
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    report = check_config(config, base, expect=Expect(new_tokens=2))
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#extending-the-vocabulary
    """
    if not expect.new_tokens:
        return
    tokens, base = expect.new_tokens, facts.base
    first_new = (base.vocab_size or 0) - tokens
    head = base.output_embeddings
    sides = [base.input_embeddings]
    if head and base.input_embeddings not in base.tied_to(head):
        sides.append(head)
    for side in filter(None, sides):
        rows = facts.trained_rows(side)
        missing = (
            tokens if rows is None else sum(row not in rows for row in range(first_new, first_new + tokens))
        )
        if facts.keeps(side) or side in (*facts.adapted, *facts.stored) or not missing:
            continue
        leaf = side.rpartition(".")[2]
        yield Violation(
            where=side,
            observed=f"{missing} of {tokens} new tokens have rows in {leaf} that are frozen at random values",
            expected="added rows to be trained and saved",
            fix=advise_any(ways_to_train_rows(facts, side, first_new, tokens)),
            severity="error" if side == base.input_embeddings else "warning",
        )
