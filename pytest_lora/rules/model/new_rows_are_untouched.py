from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise_any
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.model import InitialRows, ModelFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import ways_to_train_rows


@rule("LORA248", severity="warning", needs=ModelFacts)
def new_rows_are_untouched(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The vocabulary was extended, the new rows are at their initial values, and nothing trains them.

    ## What it does
    Looks for rows at the end of the embedding and of the head that equal the mean of all others, where
    `resize_token_embeddings` puts them, and whether an adapter trains them. A row of the padding token alone is fine.
    Where the size of the vocabulary is a multiple of 8 it is an info: the rows may be there for the alignment alone
    (`pad_to_multiple_of`). With `Expect(new_tokens=n)` LORA119 judges instead.

    ## Why is this bad?
    All new tokens mean the same to the model, which is nothing, and with an untrained head they are never produced.

    ## Example
    ```python
    base.resize_token_embeddings(131)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    base.resize_token_embeddings(131)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    model = get_peft_model(base, config)
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#extending-the-vocabulary
    - https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel.resize_token_embeddings
    """
    if expect.new_tokens is not None or expect.purpose != "train":
        return
    trained = {parameter.name.removesuffix(".weight") for parameter in facts.trainable_base}
    for rows in facts.initial_rows:
        sides = (rows.module, *facts.base.tied_to(rows.module))
        if rows.padding or trained.intersection(sides) or any(_trains(c, rows, sides) for c in facts.configs):
            continue
        config = facts.configs[0] if facts.configs else None
        aligned = (rows.first + rows.count) % 8 == 0
        yield Violation(
            where=rows.module,
            observed=f"the last {rows.count} of {rows.first + rows.count} rows equal the mean of the others, where "
            "resize_token_embeddings puts new ones, and nothing trains them"
            + (": fine if they are there for the alignment alone" if aligned else ""),
            expected="added rows to be trained and saved",
            fix=advise_any(ways_to_train_rows(config, rows.module, rows.first, rows.count))
            if config
            else "train the new rows (trainable_token_indices, or modules_to_save)",
            severity="info" if aligned else None,
        )


def _trains(config: ConfigFacts, rows: InitialRows, sides: tuple[str, ...]) -> bool:
    """Whether an adapter trains every one of these rows, or the rows of what is tied to them."""
    wanted = range(rows.first, rows.first + rows.count)
    return any(
        config.keeps(side)
        or side in config.adapted
        or set(wanted) <= (config.trained_rows(side) or frozenset())
        for side in sides
    )
