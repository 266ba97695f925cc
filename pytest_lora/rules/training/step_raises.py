from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.steps import Failure, FailureKind
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA319", severity="error", needs=TrainingFacts)
def step_raises(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """A training step cannot be taken: the model or the optimizer raises.

    ## What it does
    Explains what the forward pass, the backward pass or the optimizer raised, where its words are known, and what
    mends it. Any other error, what a `loss_fn` raises, and memory that runs out go on as they are.

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
    if failure.kind == "text too long":
        return (
            f"cut the texts: rows are {failure.length} tokens long, and the model has {failure.positions} positions "
            "(max_position_embeddings)"
        )
    if failure.kind == "inputs of other lengths":
        return f"give each token one value: {'; '.join(failure.odd)}; pad and cut them all together, in one place"
    return _FIXES[failure.kind]


_FIXES: dict[FailureKind, str] = {
    "state of another shape": "make the optimizer anew without its saved state, which is of other shapes: that of an "
    "adapter of another rank or other target modules",
    "label dtype": "give labels in the dtype and shape of the loss: for classes and tokens (torch.long) "
    "batch['labels'] = batch['labels'].long(); floats for regression and several labels a row; see problem_type and "
    "num_labels of the model's config",
    "label shape": "give labels the shape of what is predicted: for tokens the length of input_ids, padded with -100; "
    "for classes one index a row (torch.long), or floats for several labels a row",
    "no head": "load the model with a head that makes a loss of labels (AutoModelForCausalLM and its like, not "
    "AutoModel), or make the loss yourself in loss_fn",
    "ids are not whole": "give ids and labels as whole numbers (torch.long)",
    "no padding token": "set model.config.pad_token_id = tokenizer.pad_token_id",
    "weight dtypes": "give all weights that compute together one dtype, or train under torch.autocast: cast what was "
    "left in another dtype (norms, the head) or load the base in one",
    "index": "look for ids without a row and for texts longer than the model has positions",
    "devices": "bring the model, the adapter and the batch to one device",
    "inference tensors": "build the model outside of inference mode (torch.inference_mode)",
    "input of the wrapper": "the batch does not have it: PEFT's class for the task_type hands it on. Make the adapter "
    "with task_type=None where the model takes other inputs than text",
    "unknown input": "leave out of the batch what the model does not take",
    "graph used twice": "make the graph anew at every step: call the model again and keep no tensor of the step before",
    "placeholders": "make text and media in one call of the model's own processor, and cut neither afterwards: each "
    "image, video or audio needs as many placeholder tokens in input_ids as the model makes features of it",
    "token types": "hand on the token_type_ids (mm_token_type_ids) that the processor gives",
    "changed in place": "change no tensor in place that the backward pass needs",
}
