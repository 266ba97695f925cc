from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.optimizer import OptimizerFacts, Part
from pytest_lora.findings import Severity, grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import optimizer_anew


@rule("LORA301", severity="error", needs=OptimizerFacts)
def optimizer_misses_trainable_parameters(facts: OptimizerFacts, expect: Expect) -> Iterator[Violation]:
    """The optimizer does not hold everything that the model trains.

    ## What it does
    Compares, by identity, the parameters of the optimizer with the trainable parameters of the active
    adapters: low-rank factors, magnitudes, full copies (`modules_to_save`), embedding rows. Holding
    frozen parameters as well is harmless, and leaving out `lora_A` alone is what LoRA-FA does.

    ## Why is this bad?
    What the optimizer does not hold gets gradients but never changes. Without `lora_B`, which starts at
    zero, the adapter stays without effect; an optimizer that was made before `get_peft_model` holds no
    adapter at all.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_A" in n], lr=1e-3)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## References
    - LoRA-FA, which trains `lora_B` alone on purpose: https://arxiv.org/abs/2308.03303
    - https://github.com/huggingface/peft/issues/1504
    """
    if not facts.missing or expect.purpose != "train" or facts.stale:
        return
    if not facts.holds_adapter and facts.lacks("a", "b"):
        made_before = facts.frozen and not facts.foreign
        yield Violation(
            where=f"optimizer ({facts.optimizer})",
            observed="the optimizer holds none of the adapter's trainable tensors: "
            f"{len(facts.lacks('a', 'b'))} lora_A and lora_B are missing"
            + (f", and {facts.frozen} frozen base weights are in it" if made_before else ""),
            expected="every parameter with requires_grad in the optimizer",
            fix="make the optimizer after get_peft_model, from the parameters with requires_grad: "
            + optimizer_anew(facts.groups[0].lr),
        )
        return
    for part, (what, severity) in _PARTS.items():
        names = facts.lacks(part)
        if names:
            yield Violation(
                where=f"optimizer ({facts.optimizer}), {grouped(names)}",
                observed=f"the optimizer misses {what}, which {'is' if len(names) == 1 else 'are'} trainable",
                expected="every parameter with requires_grad in the optimizer",
                fix=f"make the optimizer from all that trains: {optimizer_anew(facts.groups[0].lr)}",
                severity=severity,
            )


_PARTS: dict[Part, tuple[str, Severity]] = {
    "b": ("lora_B", "error"),
    "a": ("lora_A", "info"),
    "saved": ("the head or other full copies (modules_to_save)", "error"),
    "rows": ("the embedding rows of trainable_token_indices", "error"),
    "further": ("what the variant of LoRA trains beside them (DoRA's magnitudes)", "warning"),
    "bias": ("biases", "warning"),
}
"""What each part is called, and how grave it is to leave it out."""
