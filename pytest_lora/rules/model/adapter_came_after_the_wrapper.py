from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA247", severity="warning", needs=ModelFacts)
def adapter_came_after_the_wrapper(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter was put in after DDP, FSDP or torch.compile wrapped the model.

    ## What it does
    Looks for parameters of adapters that the wrapper around them does not know: DDP and FSDP note what they
    reduce or shard when they are made, and what they miss while training is an error. Adapters on a compiled
    model are a warning.

    ## Why is this bad?
    DDP reduces the gradients of the parameters that it knows. Each GPU trains an adapter of its own, the
    replicas drift apart, and the saved one is that of the first. FSDP neither shards nor reduces them. On a compiled
    model, PEFT saves keys with `_orig_mod.` in them, which match nothing in a model that is not compiled.

    ## Example
    ```python
    compiled = torch.compile(base, backend="eager")
    model = get_peft_model(compiled, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    compiled = torch.compile(model, backend="eager")
    report = check_model(compiled)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    - https://huggingface.co/docs/peft/developer_guides/torch_compile
    """
    for late in facts.wrappers.late:
        compiled = late.wrapper == "torch.compile"
        if not compiled and expect.purpose != "train":
            continue
        yield Violation(
            where=grouped(name.partition(".lora_")[0] for name in late.parameters),
            observed=f"{late.wrapper} wrapped the model before the adapter was put in: "
            + (
                "its keys are saved with '_orig_mod.' in them"
                if compiled
                else f"it does not know {len(late.parameters)} parameters of the adapter, so their gradients are not "
                "reduced and the ranks drift apart"
            ),
            expected="the adapter in its place before the model is wrapped",
            fix=f"call get_peft_model, load_adapter or inject_adapter_in_model first, then {late.wrapper}",
            severity=None if compiled else "error",
        )
