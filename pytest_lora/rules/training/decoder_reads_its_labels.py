from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA336", severity="error", needs=TrainingFacts)
def decoder_reads_its_labels(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The decoder reads the very token that it is to predict.

    ## What it does
    Compares `decoder_input_ids` with the labels of an encoder-decoder: the decoder has to read what stands
    one position before its label.

    ## Why is this bad?
    With unshifted `decoder_input_ids` the answer stands in the input. The loss falls to nearly nothing, the
    adapter learns to copy, and generation, where nothing stands there, gives nonsense.

    ## Example
    ```python
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    model = get_peft_model(t5, LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"]))
    batch["labels"] = batch["input_ids"].flip(1)
    batch["decoder_input_ids"] = batch["labels"].clone()
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    model = get_peft_model(t5, LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"]))
    batch["labels"] = batch["input_ids"].flip(1)
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/model_doc/t5#training
    """
    if facts.custom_loss:
        return
    read = [known for known in facts.labels if known.labels >= ENOUGH and known.visible >= ALIKE]
    if read:
        yield Violation(
            where=f"{named_batches(read)}: decoder_input_ids",
            observed=f"{100 * read[0].visible:.0f} % of decoder_input_ids equal the label at their own position: "
            "the decoder reads what it is to predict",
            expected="decoder_input_ids shifted right: the start token first, then the labels but the last",
            fix="leave them out, batch.pop('decoder_input_ids'): the model makes them from the labels",
        )


ENOUGH, ALIKE = 4, 0.9
"""Labels that a verdict needs, and share of equal ones: a text of one repeated token aside, few are by chance."""
