from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA374", severity="warning", needs=TrainingFacts)
def texts_never_end(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """No text has an end token.

    ## What it does
    Looks for rows of a causal model whose texts end before the row does, so that nothing was cut off, and of which
    none ends with an `eos_token_id`, nor with a further token at which `generate` stops (`generation_config`). Where
    all end with one and the same token, that is an end of their own, at which only who serves the model can stop: an
    info. Else an info where prompts are masked, and a warning where `Expect(completion_only=True)` says that answers
    are to be learned.

    ## Why is this bad?
    The model is never taught to stop and rambles on until the longest answer is reached. Some tokenizers write a
    begin token and no end token; scripts that put texts together have to write it themselves.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.eos_token_id = 2
    batch["input_ids"][:, -1] = torch.tensor([11, 12, 13, 14])
    batch["input_ids"][:2, 9:], batch["attention_mask"][:2, 9:] = 0, 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :4] = -100
    report = check_training(model, batch, expect=Expect(completion_only=True))
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.eos_token_id = 2
    batch["input_ids"][:, -1] = 2
    batch["input_ids"][:2, 8] = 2
    batch["input_ids"][:2, 9:], batch["attention_mask"][:2, 9:] = 0, 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :4] = -100
    report = check_training(model, batch, expect=Expect(completion_only=True))
    ```

    ## References
    - https://github.com/ml-explore/mlx-examples/pull/760
    """
    known = [k for k in facts.labels if k.kind == "causal" and k.bounds.last_tokens and not k.padding]
    answers = expect.completion_only or all(k.bounds.prompted == k.rows for k in known)
    if not answers or expect.purpose != "train" or any(k.bounds.closed for k in known):
        return
    finished = sum(k.bounds.finished for k in known)
    own = {k.bounds.last for k in known}
    if sum(k.rows for k in known) >= ENOUGH_OF_ONE and len(own) == 1 and None not in own:
        (token,) = own
        yield Violation(
            where=f"{named_batches(known)}: input_ids",
            observed=f"all texts end with token {token}, which is no end token of the model (eos_token_id)",
            expected="an end token at which generate stops",
            fix=f"set model.generation_config.eos_token_id = {token}, as a list beside the others if there are any, or "
            "end texts with the end token of the base",
            severity="info",
        )
    elif finished >= ENOUGH and any(k.bounds.last_tokens > 1 for k in known):
        yield Violation(
            where=f"{named_batches(known)}: input_ids",
            observed=f"{finished} texts end before their row does, and none of them with an end token (eos_token_id)",
            expected="an end token behind each answer, so that the model learns to stop",
            fix="write the end token behind each text before it is padded, text + tokenizer.eos_token, with a label",
            severity=None if expect.completion_only else "info",
        )


ENOUGH = 2
"""Texts that a verdict needs."""

ENOUGH_OF_ONE = 4
"""Texts of which all end alike: with 100 full stops, commas and line breaks to end with, four do so by design."""
