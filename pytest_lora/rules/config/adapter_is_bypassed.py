from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import without

ATTENTION_OUTPUT = "NonDynamicallyQuantizableLinear"
"""The class of ``out_proj`` in ``torch.nn.MultiheadAttention``, and of nothing else in torch."""


@rule("LORA132", severity="warning", needs=ConfigFacts)
def adapter_is_bypassed(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """Adapters sit on `out_proj` of `torch.nn.MultiheadAttention`, which never calls it.

    ## What it does
    Looks for adapters on that module where the attention around it carries none.

    ## Why is this bad?
    `torch.nn.MultiheadAttention` hands the weight of `out_proj` to one function instead of calling the module. The
    adapter is not part of the forward pass, gets no gradient and changes nothing. PEFT has a layer for the whole
    attention, which takes its `out_proj` along. Where no other module is adapted it is an error.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["out_proj", "linear1"])
    report = check_config(config, torch_attention_base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["self_attn", "linear1"])
    report = check_config(config, torch_attention_base)
    ```

    ## References
    - https://github.com/huggingface/peft/pull/1324
    - https://github.com/helicalAI/helical/pull/405
    - https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html
    """
    outputs = [layer.module for layer in facts.layers if layer.kind == ATTENTION_OUTPUT]
    bypassed = [module for module in outputs if module.rpartition(".")[0] not in facts.adapted]
    if bypassed:
        attention = sorted({module.split(".")[-2] for module in bypassed if "." in module})
        leaves = sorted({layer.leaf for layer in facts.layers if layer.module not in bypassed})
        targets = facts.settings.target_modules
        kept = without(targets, "out_proj") if isinstance(targets, tuple) else leaves
        yield Violation(
            where=grouped(bypassed),
            observed=f"{len(bypassed)} of {len(facts.layers)} adapters are on out_proj of torch.nn.MultiheadAttention, "
            "which uses its weight without calling it: they have no effect and get no gradient",
            expected="adapters on modules that the forward pass calls",
            fix=advise(
                "target the attention itself, which takes out_proj along: ",
                change(target_modules=tuple(dict.fromkeys((*kept, *attention)))),
            ),
            severity="error" if len(bypassed) == len(facts.layers) else None,
        )
