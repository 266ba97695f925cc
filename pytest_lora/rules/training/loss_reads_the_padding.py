from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

NO_PART = 0.1
"""Share of a gradient. Hidden padding has none of one that is read at texts; the loss that balances experts, which some
models take over padding too, has far less."""


@rule("LORA386", severity="warning", needs=TrainingFacts)
def loss_reads_the_padding(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """A loss of one's own is made of what the model gives for padding.

    ## What it does
    Follows the gradient of a `loss_fn` back to the embedded tokens at the last step. Of a batch that is padded with
    `pad_token_id` or an end token, next to nothing arrives at positions that `attention_mask` hides, unless the loss
    reads results there. Where blocks are checkpointed and where labels tell the padding (LORA321) nothing is said.

    ## Why is this bad?
    The last position of a row that is padded on the right is padding, and an embedding or a reward that is read there
    is that of the padding: texts are told apart by their length alone. A mean over all positions, a distillation over
    all tokens and log-probabilities that are summed without a mask count the padding too, and the shortest texts most.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["input_ids"][:3, 9:], batch["attention_mask"][:3, 9:] = 0, 0
    del batch["labels"]

    def last_states(model, batch):
        states = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[-1]
        last = states[:, -1]
        return nn.functional.mse_loss(last[0], last[1]) - nn.functional.mse_loss(last[0], last[2]) + 1

    report = check_training(model, batch, loss_fn=last_states)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["input_ids"][:3, 9:], batch["attention_mask"][:3, 9:] = 0, 0
    del batch["labels"]

    def last_states(model, batch):
        states = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[-1]
        last = states[torch.arange(len(states)), batch["attention_mask"].sum(1) - 1]
        return nn.functional.mse_loss(last[0], last[1]) - nn.functional.mse_loss(last[0], last[2]) + 1

    report = check_training(model, batch, loss_fn=last_states)
    ```

    ## References
    - https://github.com/opensearch-project/ml-commons/pull/4744
    - https://github.com/huggingface/sentence-transformers/issues/3208
    """
    padding = facts.padding
    if padding is not None and padding.share > NO_PART and not any(known.padding for known in facts.labels):
        yield Violation(
            where=f"loss_fn, batch {padding.batch}: {padding.rows} padded rows",
            observed=f"{padding.share:.0%} of the gradient at the embedded tokens is at padding, which attention_mask "
            "hides: the loss is made of what the model gives there",
            expected="a loss of what the model gives for texts",
            fix="read a row at its last token, hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1] where "
            "padding is on the right; multiply what each token gives by attention_mask, and divide by its sum",
        )
