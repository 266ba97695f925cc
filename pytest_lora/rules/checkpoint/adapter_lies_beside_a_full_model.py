from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, PICKLED, WEIGHTS, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA405", severity="warning", needs=CheckpointFacts)
def adapter_lies_beside_a_full_model(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The folder holds a whole model and an adapter configuration.

    ## What it does
    Looks for model.safetensors (or its shards, or pytorch_model.bin) beside adapter_config.json.

    ## Why is this bad?
    transformers takes a folder with adapter_config.json for an adapter: it loads the original base and puts
    the adapter on it. Beside merged weights it is a leftover: the merged weights are ignored, or an adapter
    is put on top of weights that have it already.

    ## Example
    ```python
    path = adapter()
    base.save_pretrained(path)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/transformers/peft
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraModel.merge_and_unload
    """
    if not facts.merged or facts.config is None:
        return
    has_weights = facts.weights is not None or facts.has(PICKLED) or bool(facts.shards)
    beside = f"{CONFIG} and adapter weights lie" if has_weights else f"{CONFIG} without adapter weights lies"
    yield Violation(
        where=facts.name,
        observed=f"{beside} beside the full model {', '.join(facts.merged[:3])}, as after a merge",
        expected="an adapter, or a merged model, in a folder of its own",
        fix=f"if the model is merged, delete {CONFIG} and the adapter file; else move the full model elsewhere"
        if has_weights
        else f"if the model is merged, delete {CONFIG}; if {facts.merged[0]} is the adapter itself, "
        f"rename it to {WEIGHTS}",
        severity=None if has_weights else "error",
    )
