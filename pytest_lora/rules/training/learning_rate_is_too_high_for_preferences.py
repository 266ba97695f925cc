from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TRIED_OUT, TrainingFacts
from pytest_lora.rules import Violation, rule

OF_SFT = 1e-4
"""Twenty times the 5e-6 that TRL's documentation, the alignment handbook and LLaMA-Factory give for DPO with LoRA; the
lowest rate in use for supervised fine-tuning with it."""


@rule("LORA371", severity="warning", needs=TrainingFacts)
def learning_rate_is_too_high_for_preferences(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Preference tuning runs at a learning rate of supervised fine-tuning.

    ## What it does
    Looks for a rate of 1e-4 or more with an optimizer of the Adam family where chosen answers are compared with
    rejected ones: a trainer of TRL for that (DPO, KTO, ORPO, CPO), or inputs named so. It is an info where the
    schedule does not say for how many steps, or for less than 20.

    ## Why is this bad?
    The loss compares probabilities of whole answers, and gets to zero by making both of them less likely. At a rate of
    supervised fine-tuning it does so within some hundred steps: the accuracy of preferences is 1, and the model talks
    nonsense.

    ## Example
    ```python
    from transformers import get_cosine_schedule_with_warmup
    def score(model, ids):
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    def preference_loss(model, batch):
        gained = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        with torch.no_grad(), model.disable_adapter():
            before = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        return -torch.nn.functional.logsigmoid(0.1 * (gained - before)).mean()

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    pairs = {"chosen_input_ids": batch["input_ids"][:2], "rejected_input_ids": batch["input_ids"][2:4]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 20, 400)
    report = check_training(model, pairs, optimizer=optimizer, scheduler=scheduler, loss_fn=preference_loss)
    ```

    ## Use instead
    ```python
    from transformers import get_cosine_schedule_with_warmup
    def score(model, ids):
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    def preference_loss(model, batch):
        gained = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        with torch.no_grad(), model.disable_adapter():
            before = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        return -torch.nn.functional.logsigmoid(0.1 * (gained - before)).mean()

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    pairs = {"chosen_input_ids": batch["input_ids"][:2], "rejected_input_ids": batch["input_ids"][2:4]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-6)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 20, 400)
    report = check_training(model, pairs, optimizer=optimizer, scheduler=scheduler, loss_fn=preference_loss)
    ```

    ## References
    - TRL, learning rates with LoRA (DPO 5e-6): https://huggingface.co/docs/trl/main/en/peft_integration
    """
    rate = facts.peak_rate
    given = facts.optimizer_given and facts.optimizer.adaptive
    if not given or not facts.compares_answers or not OF_SFT <= rate < math.inf:
        return
    planned = facts.schedule.planned if facts.schedule else None
    steps = f" over {planned} steps" if planned else ""
    yield Violation(
        where=f"optimizer ({facts.optimizer.optimizer})",
        observed=f"a learning rate of {rate:g}{steps} for chosen against rejected answers: that is one of supervised "
        "fine-tuning",
        expected="about 5e-6 with LoRA, ten times that of full fine-tuning",
        fix="set the learning rate lower, lr=5e-6, and raise it only while the log-probabilities of chosen answers do "
        "not fall",
        severity=None if planned and planned >= TRIED_OUT else "info",
    )
