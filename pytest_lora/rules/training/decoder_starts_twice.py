from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA367", severity="warning", needs=TrainingFacts)
def decoder_starts_twice(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The labels of a decoder begin with the token that the model puts before them.

    ## What it does
    Looks for labels of an encoder-decoder whose rows all begin with `decoder_start_token_id`, in batches without
    `decoder_input_ids`.

    ## Why is this bad?
    An encoder-decoder makes what its decoder reads from the labels, with the start token before them. Where the
    tokenizer wrote it too, it stands there twice, and the model is taught to answer the start with a start. At
    generation, where there is one, it is asked something that it never saw. Tokenizers of Whisper do that; scripts
    that cut off `bos_token_id` in its place cut off nothing, as Whisper's is another one.

    ## Example
    ```python
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4, decoder_start_token_id=5)
    )
    model = get_peft_model(t5, LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"]))
    batch["labels"] = batch["input_ids"].flip(1)
    batch["labels"][:, 0], batch["labels"][:, 1] = 5, 6
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4, decoder_start_token_id=5)
    )
    model = get_peft_model(t5, LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"]))
    batch["labels"] = batch["input_ids"].flip(1)[:, 1:].contiguous()
    report = check_training(model, batch)
    ```

    ## References
    - https://github.com/huggingface/transformers/issues/29973
    """
    if "decoder_input_ids" in facts.inputs:
        return
    twice = [known for known in facts.labels if known.kind == "sequence" and known.bounds.started]
    if twice and sum(known.bounds.started for known in twice) == sum(known.rows for known in facts.labels):
        start = twice[0].bounds.start
        yield Violation(
            where=f"{named_batches(twice)}: labels",
            observed=f"all rows of the labels begin with {start}, decoder_start_token_id, which the model puts before "
            "them: the decoder reads the start token twice",
            expected="labels that begin with what comes after the start token",
            fix="cut it off: batch['labels'] = batch['labels'][:, 1:].contiguous()",
        )
