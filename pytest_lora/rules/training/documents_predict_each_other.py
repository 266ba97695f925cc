from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA368", severity="info", needs=TrainingFacts)
def documents_predict_each_other(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The last token of a packed document is to predict the first one of the next.

    ## What it does
    Looks, in rows of several documents whose `position_ids` begin anew, for labels at the first token of a document
    behind another one. Where all these labels are one token, such as a begin token, that can be learned, and is no
    finding. An info: it is one label a document, and many pack so.

    ## Why is this bad?
    A causal model predicts each label from the tokens before it. At the seam of two documents that asks for the
    beginning of a text that has nothing to do with what is read: noise in every row, the more the shorter the
    documents are. Attention that keeps documents apart does not help, as it is the label that crosses the seam.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.use_cache = False
    del batch["attention_mask"]
    batch["position_ids"] = torch.cat([torch.arange(8), torch.arange(8)]).repeat(4, 1)
    batch["labels"] = batch["input_ids"].clone()
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.use_cache = False
    del batch["attention_mask"]
    batch["position_ids"] = torch.cat([torch.arange(8), torch.arange(8)]).repeat(4, 1)
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main_classes/data_collator#transformers.DataCollatorWithFlattening
    """
    crossing = [known for known in facts.labels if known.bounds.crossing and known.bounds.crossing_tokens > 1]
    if crossing:
        seams = sum(known.bounds.crossing for known in crossing)
        labels = sum(known.labels for known in crossing)
        yield Violation(
            where=f"{named_batches(crossing)}: labels",
            observed=f"{seams} labels ({100 * seams / labels:.1f} %) are the first token of a packed document, to be "
            "predicted from the last token of the document before it",
            expected="labels of -100 where position_ids begin anew",
            fix="set batch['labels'][batch['position_ids'] == 0] = -100",
        )
