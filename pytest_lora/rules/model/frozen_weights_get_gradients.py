from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA255", severity="info", needs=ModelFacts)
def frozen_weights_get_gradients(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """FSDP keeps room for gradients of frozen weights.

    ## What it does
    Looks for flat parameters of `FullyShardedDataParallel` that hold frozen weights and trained ones
    (`use_orig_params=True`).

    ## Why is this bad?
    The gradient of a flat parameter is as large as the flat parameter: the frozen weights of each layer take gradient
    memory while it is reduced. torch warns of it, and PEFT's guide asks for `use_orig_params=False` with its own
    policy, which wraps the factors apart.

    ## Example
    ```python
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    settings = {"device_id": torch.device("cpu"), "use_orig_params": True}
    report = check_model(in_one_process(FullyShardedDataParallel, model, **settings))
    ```

    ## Use instead
    ```python
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    leaves = {module for name, module in model.named_modules() if "lora_" in name and list(module.parameters())}
    settings = {
        "device_id": torch.device("cpu"),
        "auto_wrap_policy": lambda module, recurse, **_: recurse or (module in leaves and not list(module.children())),
    }
    report = check_model(in_one_process(FullyShardedDataParallel, model, **settings))
    ```

    ## References
    - https://huggingface.co/docs/peft/accelerate/fsdp
    - https://docs.pytorch.org/docs/stable/fsdp.html (frozen and trained parameters in one instance)
    """
    mixed = [s for s in facts.wrappers.shards if s.version == 1 and s.trained and s.frozen]
    if mixed and expect.purpose == "train":
        trained, frozen = sum(s.trained for s in mixed), sum(s.frozen for s in mixed)
        yield Violation(
            where=grouped(shard.name or "the model" for shard in mixed),
            observed=f"{len(mixed)} flat parameters hold {trained:,} trained numbers and {frozen:,} frozen ones, so "
            f"that gradients are {(trained + frozen) / trained:,.0f} times as large as needed while they are reduced",
            expected="trained and frozen weights in flat parameters of their own, where memory is short",
            fix="pass auto_wrap_policy=peft.utils.other.fsdp_auto_wrap_policy(model) and use_orig_params=False, or use "
            "the second FSDP (fully_shard)",
        )
