from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA250", severity="error", needs=ModelFacts)
def reduction_waits_for_ever(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """DDP waits for gradients of weights that take no part in the step.

    ## What it does
    Looks, where DDP was made with neither `find_unused_parameters` nor `static_graph`, for tensors of its reducer that
    get no gradient: those of an adapter that is not active, and those that were frozen afterwards.

    ## Why is this bad?
    DDP begins the next step when every gradient of the last one has come. The second step raises "Expected to have
    finished reduction in the prior iteration".

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    wrapped = in_one_process(nn.parallel.DistributedDataParallel, model)
    report = check_model(wrapped, ignore=["LORA216"])
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    wrapped = in_one_process(nn.parallel.DistributedDataParallel, model)
    report = check_model(wrapped)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """
    if expect.purpose != "train":
        return
    for reducer in facts.wrappers.reducers:
        if reducer.idle and not (reducer.finds_unused or reducer.static_graph or reducer.unreduced):
            yield Violation(
                where=grouped(name.partition(".lora_")[0] for name in reducer.idle),
                observed=f"DistributedDataParallel waits for the gradients of {len(reducer.idle)} tensors that take no "
                "part in a step: the second step raises",
                expected="gradients for every tensor that required them when the model was wrapped",
                fix="freeze them before the model is wrapped (model.set_adapter freezes all adapters but the one it "
                "names), or pass find_unused_parameters=True",
            )
