from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA253", severity="error", needs=ModelFacts)
def packed_weights_are_cast(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """FSDP casts packed 4-bit weights to another dtype as it gathers them.

    ## What it does
    Looks for 4-bit weights that are stored in a floating dtype (`bnb_4bit_quant_storage`) in a group of FSDP whose
    policy of mixed precision has another `param_dtype`.

    ## Why is this bad?
    The floats are bytes that hold two weights each. FSDP takes them for numbers and casts them: half of the bytes are
    gone, and the forward pass raises or computes with rubbish. What is stored as `uint8` is never cast.

    ## Example
    ```python
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    packed = quantized(base, storage=torch.float32)
    model = get_peft_model(packed, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    report = check_model(in_one_process(fully_shard, model, mp_policy=policy))
    ```

    ## Use instead
    ```python
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    packed = quantized(base, storage=torch.bfloat16)
    model = get_peft_model(packed, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    report = check_model(in_one_process(fully_shard, model, mp_policy=policy))
    ```

    ## References
    - https://huggingface.co/docs/bitsandbytes/fsdp_qlora
    - https://huggingface.co/docs/peft/accelerate/fsdp
    """
    for gathered in sorted({shard.gathered_as for shard in facts.wrappers.shards} - {""}):
        cast = [
            s for s in facts.wrappers.shards if s.gathered_as == gathered and set(s.packed_as) - {gathered}
        ]
        if cast:
            stored = sorted({dtype for shard in cast for dtype in shard.packed_as} - {gathered})
            yield Violation(
                where=grouped(shard.name or "the model" for shard in cast),
                observed=f"4-bit weights are stored as {', '.join(stored)}, and FSDP gathers parameters as {gathered}",
                expected="one dtype for both, or 4-bit weights stored as uint8 under the second FSDP",
                fix=f"load the base with BitsAndBytesConfig(bnb_4bit_quant_storage={gathered!r}), or take param_dtype "
                "out of the policy of mixed precision",
            )
