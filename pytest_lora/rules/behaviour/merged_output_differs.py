from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import MergeFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA915", severity="error", needs=MergeFacts)
def merged_output_differs(facts: MergeFacts, expect: Expect) -> Iterator[Violation]:
    """The merged model gives another output than the model with its adapter.

    ## What it does
    Merges the adapters of a copy, and compares the output within the rounding of its dtype (or `rtol`,
    `atol`), and each merged bias with what `lora_bias` makes of it.

    ## Why is this bad?
    What is deployed is not what was evaluated.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["embed_tokens"], init_lora_weights=False)
    model = get_peft_model(tied_base, config)
    report = check_merge(model, batch)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tied_base, config)
    report = check_merge(model, batch)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2018
    - https://github.com/huggingface/peft/issues/3741
    - https://huggingface.co/docs/peft/developer_guides/model_merging
    """
    rtol, allowed = facts.tolerance
    if facts.biases and facts.refusal is None:
        yield Violation(
            where=grouped(facts.biases),
            observed=f"the merged bias is not that of the base and scaling times that of the adapter in "
            f"{len(facts.biases)} modules: PEFT leaves the scaling out where it merges lora_bias into quantized layers",
            expected="bias + scaling * lora_B.bias",
            fix="save the adapter, load the base in 16 bit and merge there; with alpha equal to r the scaling is 1",
        )
    elif facts.refusal is None and not facts.quantized and not facts.apart <= allowed:
        yield Violation(
            where="the output of the merged model",
            observed=f"it differs by up to {facts.apart:.3g} from that of the model with its adapter",
            expected=f"at most {allowed:.3g}, {rtol:g} of the largest output",
            fix="look at targets that share a weight (tied embeddings, the copies that layer_replication makes), at "
            "weights too coarse for the update, and at adapters that are active on some modules only",
        )
