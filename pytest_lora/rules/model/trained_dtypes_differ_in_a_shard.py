from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA254", severity="error", needs=ModelFacts)
def trained_dtypes_differ_in_a_shard(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Weights that FSDP shards together train in different dtypes.

    ## What it does
    Looks for groups of the second FSDP (`fully_shard`) in which the weights that require gradients have more than one
    dtype. Frozen weights may have any.

    ## Why is this bad?
    FSDP reduces the gradients of a group as one buffer. The first forward pass raises "FSDP expects uniform original
    parameter dtype". PEFT makes factors in float32 on a half-precision base, while full copies (`modules_to_save`)
    keep the dtype of the base.

    ## Example
    ```python
    from torch.distributed.fsdp import fully_shard

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base.bfloat16(), config)
    report = check_model(in_one_process(fully_shard, model))
    ```

    ## Use instead
    ```python
    from torch.distributed.fsdp import fully_shard

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base.bfloat16(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    report = check_model(in_one_process(fully_shard, model))
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    mixed = [s for s in facts.wrappers.shards if s.version == 2 and len(s.trained_dtypes) > 1]
    if mixed and expect.purpose == "train":
        dtypes = sorted({dtype for shard in mixed for dtype in shard.trained_dtypes})
        yield Violation(
            where=grouped(shard.name or "the model" for shard in mixed),
            observed=f"trainable weights in {' and '.join(dtypes)} in one group of FSDP: the first forward pass raises",
            expected="one dtype for all trainable weights of a group",
            fix="cast what is trained to one dtype before fully_shard, or shard the modules of the other dtype first, "
            "as groups of their own",
        )
