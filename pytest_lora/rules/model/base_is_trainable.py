from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA204", severity="error", needs=ModelFacts)
def base_is_trainable(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Parameters of the base require gradients, but no adapter file will hold them.

    ## What it does
    Looks for base parameters that train although no configuration says so (`bias`, `modules_to_save` and
    `trainable_token_indices` do).

    ## Why is this bad?
    The whole base trainable is a full fine-tune in memory and speed. In either case `save_pretrained`
    writes the adapter only: what the base learned is lost, and the reloaded model is worse than the trained
    one.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.requires_grad_(True)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1342
    - https://github.com/artidoro/qlora/issues/214
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    trained = facts.trainable_base
    if not trained or expect.purpose == "inference":
        return
    numbers = sum(parameter.parameters for parameter in trained)
    share = 100 * numbers / max(facts.base.parameters, 1)
    names = sorted({parameter.name.split(".")[-2] for parameter in trained if "." in parameter.name})
    whole = share > 50
    yield Violation(
        where=grouped(parameter.name for parameter in trained),
        observed=f"{len(trained)} base parameters ({numbers:,} numbers, {share:.3g} % of the base) "
        "require gradients; "
        "save_pretrained will not save them",
        expected="base weights frozen; only adapters, modules_to_save and chosen token rows trainable",
        fix=_fix(facts, names, whole),
    )


def _fix(facts: ModelFacts, names: list[str], whole: bool) -> str:
    again = (
        f" and make the adapter trainable again with model.set_adapter({facts.active[0]!r})"
        if facts.active
        else ""
    )
    freeze = f"freeze the base with model.requires_grad_(False){again}"
    if whole:
        return freeze
    return f"list {names} in modules_to_save instead of making them trainable by hand, or {freeze}"
