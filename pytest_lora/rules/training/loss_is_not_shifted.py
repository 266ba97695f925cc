from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import COPIED
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA369", severity="error", needs=TrainingFacts)
def loss_is_not_shifted(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The loss compares each label with the prediction made from that very token.

    ## What it does
    Takes the logits that a causal model gave for the first loss, and computes the mean cross-entropy with the labels
    at their own position and one position later. Where the loss is the first of these, and the labels are a copy of
    the input, nothing was shifted. Of any other loss its gradient tells, a smoothed one among them: it is lowest at the
    token that the loss asks for.

    ## Why is this bad?
    A causal model reads a token before it is asked for it, so that this loss is lowest where the input is copied. It
    falls fast, and generation repeats the last token. Most models shift labels themselves; a loss function of one's
    own, and some models (`MBartForCausalLM`), do not, and label smoothing of older Trainers forgot it under PEFT.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

    def loss_fn(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    report = check_training(model, batch, loss_fn=loss_fn)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

    def loss_fn(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    report = check_training(model, batch, loss_fn=loss_fn)
    ```

    ## References
    - https://github.com/huggingface/transformers/issues/27161
    - https://github.com/huggingface/transformers/issues/27517
    """
    copied = [k for k in facts.labels if k.kind == "causal" and k.same >= COPIED and not k.masked_inputs]
    if facts.shifts or not copied:
        return
    architecture = facts.model.base.architecture
    fills_in = architecture.endswith("ForMaskedLM") and not facts.custom_loss
    yield Violation(
        where="loss_fn" if facts.custom_loss else f"the loss of {architecture}",
        observed=f"{_seen(facts)}: the model learns to repeat its input, as nothing "
        f"{'masks the input' if fills_in else 'shifts the labels'}",
        expected="labels of masked tokens alone"
        if fills_in
        else "the logits at position t against the label at position t + 1",
        fix=_fix(fills_in, facts.custom_loss),
    )


def _fix(fills_in: bool, custom_loss: bool) -> str:
    if fills_in:
        return (
            "mask the tokens that are to be filled in, and give the others the label -100: "
            "DataCollatorForLanguageModeling(tokenizer, mlm=True)"
        )
    if custom_loss:
        return "shift in the loss: logits[:, :-1] against labels[:, 1:]"
    return (
        "this model does not shift labels itself: set batch['labels'] = torch.nn.functional.pad(batch['labels']"
        "[:, 1:], (0, 1), value=-100)"
    )


def _seen(facts: TrainingFacts) -> str:
    shift, taught = facts.shift, facts.taught
    if shift is not None and shift.forgotten:
        return (
            f"the loss, {shift.loss:.4g}, is that of labels and logits at the same position ({shift.in_place:.4g}); "
            f"one position later it would be {shift.ahead:.4g}"
        )
    assert taught is not None
    return (
        f"by its gradient, the loss asks at {taught.read:.0%} of {taught.positions} positions for the token that was "
        f"just read, and at {taught.following:.0%} for the next one"
    )
