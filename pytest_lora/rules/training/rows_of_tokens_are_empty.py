from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA375", severity="warning", needs=TrainingFacts)
def rows_of_tokens_are_empty(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The texts use tokens that the base was never taught: their rows are zero, and nothing trains them.

    ## What it does
    Looks up the tokens of the batches in the input embedding, and their labels in the head. A row of zeros that no
    adapter and no optimizer trains is a token without a meaning. The pad token is no finding.

    ## Why is this bad?
    Base models reserve tokens for chat templates, and some have rows of zeros for them. Trained on such texts, an
    adapter in the attention cannot tell these tokens apart, and where the head's row is zero, the logit of the token
    is always zero: an end of turn can hardly be learned, and the model does not stop.

    ## Example
    ```python
    base.lm_head.weight.data[5] = 0
    batch["input_ids"][:, -1] = batch["labels"][:, -1] = 5
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    base.lm_head.weight.data[5] = 0
    batch["input_ids"][:, -1] = batch["labels"][:, -1] = 5
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#extending-the-vocabulary
    """
    trained = {parameter.name.removesuffix(".weight") for parameter in facts.model.trainable_base}
    for rows in facts.empty_rows:
        sides = (rows.module, *facts.model.base.tied_to(rows.module))
        learned = any(
            config.keeps(side)
            or side in config.adapted
            or set(rows.tokens) <= (config.trained_rows(side) or frozenset())
            for config in facts.model.configs
            for side in sides
        )
        if learned or trained.intersection(sides):
            continue
        shown = ", ".join(map(str, rows.tokens[:8])) + (", ..." if len(rows.tokens) > 8 else "")
        head = (
            rows.module == facts.model.base.output_embeddings
            and rows.module != facts.model.base.input_embeddings
        )
        yield Violation(
            where=rows.module,
            observed=f"{len(rows.tokens)} tokens of the batches have rows of zeros that nothing trains: {shown}"
            + (", and they are targets" if head else ""),
            expected="tokens that the base knows, or rows that are trained",
            fix=f"set modules_to_save=[{rows.module.rpartition('.')[2]!r}]"
            + ("" if head else f", or trainable_token_indices={list(rows.tokens[:8])}")
            + "; or use a template of tokens that the base was trained on",
        )
