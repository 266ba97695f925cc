from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA249", severity="error", needs=ModelFacts)
def gradients_are_not_reduced(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """DDP does not reduce gradients of weights that were frozen when it was made.

    ## What it does
    Asks the reducer of `DistributedDataParallel` for the tensors that it has. A tensor that requires gradients now and
    is not among them was frozen when the model was wrapped: `set_adapter`, `requires_grad_` or a schedule that
    unfreezes came afterwards.

    ## Why is this bad?
    DDP registers its hooks once. Each GPU trains these weights on its own data, the replicas drift apart in
    silence, and the saved ones are those of the first.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    wrapped = in_one_process(nn.parallel.DistributedDataParallel, model)
    model.set_adapter("second")
    report = check_model(wrapped)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    wrapped = in_one_process(nn.parallel.DistributedDataParallel, model)
    report = check_model(wrapped)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """
    if expect.purpose != "train":
        return
    for reducer in facts.wrappers.reducers:
        if reducer.unreduced:
            yield Violation(
                where=grouped(name.partition(".lora_")[0] for name in reducer.unreduced),
                observed=f"{len(reducer.unreduced)} trainable tensors were frozen when DistributedDataParallel was "
                "made: their gradients are not reduced, and the ranks drift apart",
                expected="the weights that are trained to require gradients before the model is wrapped",
                fix="call set_adapter or requires_grad_ first, then wrap the model in DistributedDataParallel again",
            )
