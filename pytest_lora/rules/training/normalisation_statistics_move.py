from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA331", severity="error", needs=TrainingFacts)
def normalisation_statistics_move(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Running statistics of the frozen base move during training.

    ## What it does
    Looks for saved buffers of the base, above all `running_mean` and `running_var` of BatchNorm, that
    changed in the steps taken or since `base_snapshot`.

    ## Why is this bad?
    Freezing parameters does not freeze buffers: in training mode BatchNorm goes on averaging. The adapter
    file does not hold these numbers, so that the adapter, loaded on the base as it was, gives other
    results.

    ## Example
    ```python
    model = get_peft_model(batchnorm_base, LoraConfig(target_modules=["conv"]))
    report = check_training(model, image_batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(batchnorm_base, LoraConfig(target_modules=["conv"]))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    report = check_training(model, image_batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#check-batchnorm
    """
    moved = [change for change in facts.changes if change.kind == "buffer"]
    for batch_norm in (True, False):
        names = dict.fromkeys(change.name for change in moved if change.batch_norm is batch_norm)
        if names and expect.purpose == "train":
            what = "BatchNorm running statistics (buffers)" if batch_norm else "saved buffers"
            yield Violation(
                where=grouped(names),
                observed=f"{what} of the base changed in training, and the adapter file does not hold them",
                expected="buffers of the base as they were",
                fix="keep them in eval mode while training: for module in model.modules(): "
                "'BatchNorm' in type(module).__name__ and module.eval()"
                if batch_norm
                else "keep these modules in eval mode while training, or name them in modules_to_save",
                severity=None if batch_norm else "warning",
            )
