from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import Failure, TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA319", severity="error", needs=TrainingFacts)
def step_raises(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """A training step cannot be taken: the model or the optimizer raises.

    ## What it does
    Tells what the forward pass, the backward pass or the optimizer raised, and what usually mends it. What a
    `loss_fn` raises, and memory that runs out, goes on as it is.

    ## Why is this bad?
    Training stops there too, often with words that name neither the batch nor the cause: a text longer than
    the model has positions, labels of another length or dtype than the loss takes, weights of two dtypes,
    an optimizer whose state was loaded from an adapter of another rank.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = batch["labels"].float()
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = batch["labels"].long()
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    failure = facts.failure
    if failure is not None:
        yield Violation(
            where=f"step {failure.step}, batch {failure.batch}, {failure.phase}",
            observed=f"{failure.error}: {failure.message}",
            expected="a step that can be taken",
            fix=_remedy(failure),
        )


def _remedy(failure: Failure) -> str:
    length, positions = failure.length, failure.positions
    if failure.phase == "forward pass" and length and positions and length > positions:
        return (
            f"cut the texts: rows are {length} tokens long, and the model has {positions} positions "
            "(max_position_embeddings)"
        )
    if failure.phase == "optimizer step" and "size" in failure.message:
        return (
            "make the optimizer anew without its saved state, which is of other shapes: that of an adapter of another "
            "rank or other target modules"
        )
    return next(fix for words, fix in _FIXES.items() if re.search(words, failure.message))


_FIXES = {
    r"target dtype|[Tt]arget size|dtype Long|dtype Float but|be cast to|probabilities": "give labels in the dtype and "
    "shape of the loss: class indices (torch.long) for classes and tokens, floats for regression and several labels "
    "a row; see problem_type and num_labels of the model's config",
    r"'indices'": "give ids and labels as whole numbers (torch.long)",
    r"input batch_size": "give labels the shape of what is predicted: for tokens the length of input_ids, padded with "
    "-100; for classes one index a row (torch.long), or floats for several labels a row",
    r"padding token": "set model.config.pad_token_id to the tokenizer's",
    r"dtype|scalar type": "give all weights that compute together one dtype, or train under torch.autocast: cast what "
    "was left in another dtype (norms, the head) or load the base in one",
    r"index out of range|out of bounds|device-side": "look for ids without a row and for texts longer than the model "
    "has positions",
    r"same device|on device": "bring the model, the adapter and the batch to one device",
    r"[Ii]nference tensor": "build the model outside torch.inference_mode()",
    r"unexpected keyword": "leave out of the batch what the model does not take",
    r"second time": "make the graph anew at every step: call the model again and keep no tensor of the step before",
    r"inplace|in-place": "change no tensor in place that the backward pass needs",
    r"": "mend what was raised; the same batch raises it in training too",
}
"""What mends an error, found by its words; the first that fits."""
