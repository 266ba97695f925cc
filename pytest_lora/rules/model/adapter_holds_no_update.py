from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA225", severity="error", needs=ModelFacts)
def adapter_holds_no_update(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter that has been trained or loaded changes nothing.

    ## What it does
    Under `Expect(fresh=False)`: looks for active modules where a factor is all zero, so that their product
    is zero. Without it, a warning where a model is for inference (`Expect(purpose="inference")` or `"eval"`), every
    active adapter is zero everywhere, and its configuration says `inference_mode=True`, as that of a saved
    adapter does.

    ## Why is this bad?
    A zero lora_B after training or loading means that nothing was learned or that no tensor of the file
    fitted; the model equals its base. Experts of a sparse mixture may never have been used, which is an
    info.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model, expect=Expect(fresh=False))
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model, expect=Expect(fresh=True))
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    - https://github.com/huggingface/peft/issues/2115
    """
    if expect.fresh is None and expect.purpose != "train":
        yield from _served_without_values(facts)
    if expect.fresh is not False:
        return
    wiped = {adapter for adapter, _ in facts.wiped}
    layers = [layer for layer in facts.active_layers if layer.adapter not in wiped]
    empty = [layer for layer in layers if layer.changes_output is False]
    if len(empty) < len(layers):
        empty = [layer for layer in empty if not layer.prunes_ranks]
    if empty:
        first = empty[0]
        zero = first.b.name if first.b.zero else first.a.name
        yield Violation(
            where=grouped(layer.module for layer in empty),
            observed=f"{zero} is all zero in {len(empty)} of {len(layers)} modules of {first.adapter!r}",
            expected="trained values, as fresh=False says",
            fix="check that the keys of the file fit this model, and that training reached these modules",
            severity="info" if all(layer.in_expert for layer in empty) else None,
        )


def _served_without_values(facts: ModelFacts) -> Iterator[Violation]:
    """Adapters whose configuration comes from a file, and whose values do not."""
    layers = facts.active_layers
    from_files = {c.adapter for c in facts.configs if c.settings.inference_mode}
    if layers and all(layer.changes_output is False and layer.adapter in from_files for layer in layers):
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"all {len(layers)} modules of {', '.join(map(repr, facts.active))} are zero: the configuration "
            "is that of a saved adapter (inference_mode=True), its values are those of a new one, and the model "
            "answers as its base",
            expected="the trained values beside the configuration",
            fix="load the adapter with PeftModel.from_pretrained(base, path), not get_peft_model, and look at what it "
            "says of missing keys; an adapter that is new on purpose: Expect(fresh=True)",
            severity="warning",
        )
