from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pytest_lora.changes import Advice, Change, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.model_parts import why_silent
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import START_ANEW, scaled


@rule(
    "LORA313",
    severity="error",
    needs=TrainingFacts,
    because_of=(
        "alpha_is_not_positive",
        "no_adapter_is_trainable",
        "adapters_are_disabled",
        "adapter_left_merged",
        "no_adapter_is_active",
        "trainable_adapter_is_not_active",
        "adapter_can_not_learn",
        "scaling_was_changed",
        "checkpointing_cuts_the_gradient",
    ),
)
def no_gradient_reaches_the_adapter(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """No gradient reaches any tensor of the adapter.

    ## What it does
    Looks for steps in which every trainable tensor of the active adapters got no gradient, or zero only,
    and says why where that can be told: frozen, disabled, merged, outside the forward pass, cut off by
    reentrant gradient checkpointing, a scaling of zero, a frozen zero factor. Adapters that X-LoRA weighs are
    frozen by design.

    ## Why is this bad?
    The run goes on to its end, the loss stays what it was or is lowered by a head alone, and the saved
    adapter is the one from the start.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    report = check_training(model, batch)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/137
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    if not facts.judges_gradients or any(t.reached for t in facts.adapter_tensors):
        return
    if facts.model.trains_xlora:
        return
    layers = facts.model.active_layers
    reasons = Counter(why_silent(facts, layer) for layer in layers)
    if not facts.has_graph and None in reasons:
        return
    reason = reasons.most_common()[0][0] if reasons else "no adapter is active"
    idle = [name for name in facts.model.training_adapters if name not in facts.model.active]
    if idle and facts.model.active and not facts.adapter_tensors:
        reason = f"the active adapter {facts.model.active[0]!r} is frozen, and the trainable {idle[0]!r} is not active"
    yield Violation(
        where=grouped(layer.module for layer in layers) if layers else "the whole model",
        observed="no gradient reaches the adapter at any step" + (f": {reason}" if reason else ""),
        expected="a gradient other than zero for the trainable tensors of every adapter",
        fix=_fix(facts, reason or "", idle),
    )


_FIXES: dict[str, str | Change] = {
    "past the hook": "call inputs_embeds.requires_grad_(True), or set use_reentrant=False",
    "past the embeddings": "give input_ids, or adapt modules behind the embeddings",
    "is not active": "call model.set_adapter({idle!r}), the adapter that is to train, before the optimizer is made",
    "disabled": "call model.base_model.enable_adapter_layers(), and train outside of model.disable_adapter",
    "merged": "call model.unmerge_adapter() before training",
    "B is zero and frozen": "let lora_B train: model.set_adapter({active!r})",
    "frozen": "load with is_trainable=True, or call model.set_adapter({active!r})",
    "outside the forward": "adapt modules that the forward pass runs through",
    "checkpointing": "call model.enable_input_require_grads(), or set "
    "gradient_checkpointing_kwargs={{'use_reentrant': False}}",
    "scaling": "give the adapter a lora_alpha above 0",
    "lora_dropout": change("set", lora_dropout=0.05),
    "both zero": START_ANEW,
    "no adapter": "call model.set_adapter({active!r}), the adapter that is to train",
    "": "look for detach, torch.no_grad or a saturated output between the adapter and the loss",
}
"""What mends each reason, found by words of it; the first that fits."""


def _fix(facts: TrainingFacts, reason: str, idle: list[str]) -> str | Change | Advice:
    """The remedy for a reason, with the names that the model has."""
    model = facts.model
    active = next(iter((*model.active, *model.adapters)), "default")
    config = model.config_of(active)
    start, fix = next((start, fix) for start, fix in _FIXES.items() if start in reason)
    if start == "scaling" and config and model.layers:
        fields = scaled(config.settings, model.layers[0].module, 2.0)
        return advise(change("set", **fields), ", which gives a scaling of 2")
    return fix if isinstance(fix, Change) else fix.format(idle=idle[0] if idle else active, active=active)
