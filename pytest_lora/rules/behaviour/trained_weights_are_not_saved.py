from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import ReloadFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA911", severity="error", needs=ReloadFacts)
def trained_weights_are_not_saved(facts: ReloadFacts, expect: Expect) -> Iterator[Violation]:
    """Weights that were trained are not in the saved adapter.

    ## What it does
    Looks for parameters that require gradients and that a saved and reloaded adapter does not bring back.

    ## Why is this bad?
    What they learned ends with the process. The loaded model is another one, and nothing says so.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    report = check_reload(model, batch)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"])
    model = get_peft_model(base, config)
    report = check_reload(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.lost:
        yield Violation(
            where=grouped(facts.lost),
            observed=f"{len(facts.lost)} trained tensors are not in the saved adapter",
            expected="every tensor that was trained comes back",
            fix=_fix(facts.lost),
        )


def _fix(lost: tuple[str, ...]) -> str:
    modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in lost})
    if all(name.endswith(".bias") for name in lost):
        return 'set bias="all" in the LoraConfig (PEFT 0.17 loses the biases of "lora_only"), or freeze the biases'
    if any("embed" in module or module == "wte" for module in modules):
        return (
            "train new tokens with trainable_token_indices, or put the embedding into modules_to_save; or save "
            "with save_embedding_layers=True"
        )
    return f"put them into modules_to_save={modules}, or freeze them"
