from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA259", severity="warning", needs=ModelFacts)
def base_was_never_loaded(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Whole layers of the base, or its embeddings, hold nothing but zeros.

    ## What it does
    Looks for numbered blocks of the base that hold zeros alone, norms included and three weight matrices at least, and
    for input embeddings that do. Single matrices of zeros are a choice (zero convolutions, gates, added blocks whose
    output projections start at zero, blocks pruned away) and are not told. Weights on the meta device or in 4 bits, and
    processes other than the first of several, are not looked at.

    ## Why is this bad?
    The base was made empty and never filled: a shard that was missing, another process that holds the weights, a
    state dict with other names. The loss starts at ln(vocabulary), and the adapter learns from nothing.

    ## Example
    ```python
    with torch.no_grad():
        for weight in base.model.layers[1].parameters():
            weight.zero_()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/transformers/pull/25686
    """
    if facts.zero_base:
        yield Violation(
            where=grouped(facts.zero_base),
            observed="nothing but zeros, in every weight there: it was made empty and never loaded",
            expected="the pretrained weights of the base",
            fix="load the base again and look at what from_pretrained or load_state_dict says of missing keys; in a "
            "run of several processes let the first one hand its weights to the others before anything is trained",
        )
