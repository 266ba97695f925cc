from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.recipe import about


@rule("LORA621", severity="warning", needs=RecipeFacts)
def rate_is_of_another_method(facts: RecipeFacts, expect: Expect) -> Iterator[Violation]:
    """The learning rate is that of another method or stage.

    ## What it does
    Looks for a rate of 1e-4 or more in preference tuning (DPO, IPO, KTO), for rates of 5e-3 or more anywhere, for
    rates of 2e-5 or less in supervised tuning of an adapter (1e-5 where the size of the base is not known), which are
    those of full fine-tuning and the default of TRL. Bases of 30 billion parameters or more are left out, as rates that
    low are in use for them. Also for a run so short that rate times steps moves nothing.

    ## Why is this bad?
    LoRA takes about ten times the rate of full fine-tuning; at a tenth of it little is learned. Preference tuning
    takes rates far below those of supervised tuning, and diverges at them.

    ## Example
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: Qwen/Qwen2.5-0.5B
    dtype: bfloat16
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    dataset_name: data/intents
    learning_rate: 2.0e-4
    beta: 0.1
    ''')
    report = check_recipe(recipe)
    ```

    ## Use instead
    ```python
    from pathlib import Path

    recipe = Path("recipe.yaml")
    recipe.write_text('''
    model_name_or_path: Qwen/Qwen2.5-0.5B
    dtype: bfloat16
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
    dataset_name: data/intents
    learning_rate: 5.0e-6
    beta: 0.1
    ''')
    report = check_recipe(recipe)
    ```

    ## References
    - LoRA Without Regret, on rates of LoRA and full fine-tuning: https://thinkingmachines.ai/blog/lora/
    - DPO, section on hyperparameters: https://arxiv.org/abs/2305.18290
    """
    setting = facts.setting
    if setting is None or setting.adapter.value is None or not setting.learning_rate.value:
        return
    rate, stage = setting.learning_rate, str(setting.objective.value or "").lower()
    shown = f"`{rate.key}: {rate.value:g}`" if rate.stated else f"a rate of {rate.value:g} ({rate.source})"
    steps = setting.max_steps.value
    if rate.value >= HIGH and not _is_plain(setting.optimizer.value):
        said, wanted = f"{shown} is too high a learning rate for Adam, at which adapters diverge", "2.0e-4"
    elif stage in PREFERENCE and rate.value >= HIGH_PREFERENCE:
        said = f"{shown} is a learning rate of supervised tuning; {stage} at it is too high and diverges"
        wanted = "5.0e-6"
    elif (
        stage in SUPERVISED
        and rate.value <= (LOW if facts.base is None else LOW_KNOWN)
        and not _is_large(facts)
    ):
        said = f"{shown} is a learning rate of full fine-tuning, too low for LoRA, which takes about ten times it"
        wanted = "2.0e-4"
    elif stage in (*SUPERVISED, *PREFERENCE, "") and steps and 0 < steps * rate.value < NOTHING:
        said = f"{shown} times {steps} steps (`{setting.max_steps.key}`) moves nothing: the learning rate is too low"
        wanted = "2.0e-4"
    else:
        return
    yield about(
        facts,
        rate,
        said,
        "1e-4 to 5e-4 for supervised tuning of an adapter, 5e-7 to 5e-5 for preferences",
        f"write `{rate.key}: {wanted}`",
    )


SUPERVISED = ("sft", "pt")
PREFERENCE = ("dpo", "ipo", "kto")
HIGH = 5e-3
"""Five times the largest rate that is usual for adapters on bases of public models, 1e-3."""
HIGH_PREFERENCE = 1e-4
"""Recipes of DPO and KTO with adapters go from 5e-7 to 5e-5."""
LOW = 1e-5
"""A usual rate of full fine-tuning (Llama 2 and Qwen 2.5 were tuned at 2e-5 to 7e-6)."""
LOW_KNOWN = 2e-5
"""The default of TRL's SFTConfig, which it has for full fine-tuning."""
LARGE = 30_000_000_000
NOTHING = 1e-5
"""Adam moves a number by the rate in a step at most; ``lora_A`` starts with numbers of about 1e-2."""


def _is_large(facts: RecipeFacts) -> bool:
    return facts.base is not None and facts.base.parameters >= LARGE


def _is_plain(optimizer: object) -> bool:
    return str(optimizer).lower() in (
        "sgd",
        "prodigy",
        "dadaptation",
        "muon",
        "adafactor",
        "schedule_free_sgd",
    )
