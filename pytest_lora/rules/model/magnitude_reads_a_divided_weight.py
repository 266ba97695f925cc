from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA256", severity="error", needs=ModelFacts)
def magnitude_reads_a_divided_weight(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """DoRA reads a base weight that FSDP gathers for the base layer alone.

    ## What it does
    Looks for modules with a magnitude of DoRA whose base layer is a group of FSDP of its own, as policies by size and
    `fully_shard` on every linear layer make it.

    ## Why is this bad?
    FSDP gathers a weight for the forward pass of the module that it was wrapped with. DoRA reads the base weight
    outside of it, to take its norm, and finds a part of it: the step raises. LoRA without DoRA
    only calls the base layer.

    ## Example
    ```python
    from torch.distributed.fsdp import fully_shard

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=True)
    model = get_peft_model(base, config)
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            in_one_process(fully_shard, module)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    from torch.distributed.fsdp import fully_shard

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=True)
    model = get_peft_model(base, config)
    for layer in model.base_model.model.model.layers:
        in_one_process(fully_shard, layer)
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/accelerate/fsdp
    - https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    if facts.wrappers.apart:
        yield Violation(
            where=grouped(facts.wrappers.apart),
            observed="FSDP gathers these base weights for their base layer alone, and DoRA reads them outside of it",
            expected="the base layer in one group with the layer that adapts it",
            fix="wrap whole decoder layers, not single linear layers (a policy by layer class, or fully_shard(layer))",
        )
