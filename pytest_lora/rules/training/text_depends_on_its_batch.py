from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import AloneFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA360", severity="warning", needs=TrainingFacts)
def text_depends_on_its_batch(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """A text gives another result in its batch than alone.

    ## What it does
    Runs one text twice in evaluation mode, in its row and cut out of it: the shortest without its padding, or the
    first packed document that stands behind another one, as `position_ids` that restart or an `attention_mask` of
    1, 2, 3 show. The results are the
    same but for rounding, unless the padding or the other document has a part in them. A head that gives one
    result a row and reads it off the padding is an error; documents that only the cache (`use_cache`) lets see
    each other are an info, as a `Trainer` turns it off.

    ## Why is this bad?
    What is learned then depends on which texts happen to share a batch, and what is served on one text at a
    time is another model: a classifier whose last token is padding, texts at positions that the padding
    shifted, answers that read the question of another document.

    ## Example
    ```python
    model = get_peft_model(gpt2_base, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"]))
    batch["attention_mask"][:2, :6] = 0
    batch["labels"][:2, :6] = -100
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(gpt2_base, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"]))
    batch["attention_mask"][:2, :6] = 0
    batch["labels"][:2, :6] = -100
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/glossary#position-ids
    - https://huggingface.co/blog/packing-with-FA2
    - https://github.com/huggingface/trl/issues/937
    - https://github.com/MeetKai/functionary/issues/195
    """
    alone = facts.alone
    if alone is None or alone.holds or any(known.attended_padding for known in facts.labels):
        return
    cause, fix = _diagnosis(alone)
    yield Violation(
        where=f"batch {alone.batch}, row {alone.row}: {alone.tokens} tokens beside {_company(alone)}",
        observed=f"the same text gives {'another result' if alone.pooled else 'other logits'} in its batch than alone, "
        f"apart by {100 * alone.apart:.2g} % of the largest: {cause}",
        expected=f"the same to {100 * alone.tolerance:g} %, which is what rounding does",
        fix=fix,
        severity="info" if alone.cached else "error" if alone.pooled else None,
    )


def _company(alone: AloneFacts) -> str:
    if alone.company == "documents":
        return "another document packed into the row"
    return "padding on both sides" if alone.side == "both" else f"padding on the {alone.side}"


def _diagnosis(alone: AloneFacts) -> tuple[str, str]:
    if alone.cached:
        return (
            "packed documents see each other while the cache is on (use_cache), which a Trainer turns off",
            "set model.config.use_cache = False where you write the training loop yourself",
        )
    if alone.company == "documents" and alone.mask == "numbers":
        return (
            "attention_mask numbers the packed documents (1, 2, 3), which this model reads as ones, so that they see "
            "each other",
            "leave attention_mask out and give position_ids that restart at 0 in each document (with "
            "model.config.use_cache = False), or patch the model as the collator that numbers them asks for",
        )
    if alone.company == "documents":
        return (
            "packed documents see each other",
            "leave attention_mask out of packed batches, so that the model keeps documents apart by their restarting "
            "position_ids"
            if alone.mask == "shows"
            else "load the model with attn_implementation='flash_attention_2', give a mask of four dimensions that is "
            "block-diagonal, or pack no documents",
        )
    if alone.pooled and None not in (alone.filler, alone.pad) and alone.filler != alone.pad:
        return (
            f"the batch is padded with token {alone.filler}, and the model's pad_token_id is {alone.pad}, so that its "
            "head pools padding as the last token of the text",
            f"set model.config.pad_token_id = {alone.filler}, that of the tokenizer, also in the text config",
        )
    if alone.pooled:
        return (
            "the head pools the padding with the text",
            "pool the tokens that attention_mask marks, and no others",
        )
    if alone.mask != "hides":
        return (
            f"padding (token {alone.filler}) is attended to, as attention_mask "
            + ("is 1 there" if alone.mask == "shows" else "is missing"),
            "hand on the attention_mask of the tokenizer or collator with the input_ids",
        )
    if alone.side != "right":
        return (
            "the padding on the left shifts the positions of the text"
            + (", as position_ids count it too" if alone.positions else ", as there are no position_ids"),
            "set batch['position_ids'] = (batch['attention_mask'].cumsum(-1) - 1).clamp(min=0), or pad on the right",
        )
    return (
        "the padding on the right has a part in it, though attention_mask hides it",
        "look for what the model does without the mask: a mean over all positions, a convolution, an attention of its "
        "own",
    )
