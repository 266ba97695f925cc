from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA133", severity="error", needs=ConfigFacts)
def invocation_never_comes(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """An activated LoRA waits for tokens that cannot come.

    ## What it does
    For `alora_invocation_tokens`: looks whether the task type is "CAUSAL_LM", whether there are any tokens, and
    whether the vocabulary has them.

    ## Why is this bad?
    Such an adapter acts only behind its invocation tokens. PEFT looks for them in the input of causal language
    models alone. Where they are never found, the base runs as it is and every gradient is zero.

    ## Example
    ```python
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[500]
    )
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]
    )
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/lora#activated-lora-alora
    - https://arxiv.org/abs/2504.12397
    """
    tokens, size = facts.settings.alora_invocation_tokens, facts.base.vocab_size
    if tokens is None:
        return
    plain = advise(change(alora_invocation_tokens=None), " for plain LoRA")
    lost = [token for token in tokens if size is not None and not 0 <= token < size]
    if facts.settings.task_type != "CAUSAL_LM":
        seen = f"task_type={facts.settings.task_type!r}: PEFT looks for them in causal language models alone"
        fix = advise(change("set", task_type="CAUSAL_LM"), ", or ", plain)
    elif lost or not tokens:
        seen = f"the vocabulary of {size} tokens does not have {lost[:5]}" if lost else "there are none"
        fix = advise(
            "take the ids from tokenizer.encode(invocation, add_special_tokens=False), or set ", plain
        )
    else:
        return
    yield Violation(
        where=f"alora_invocation_tokens on {facts.base.architecture}",
        observed=f"aLoRA with invocation tokens {list(tokens)}: {seen}; the adapter is never activated",
        expected="invocation tokens that occur in the input of a causal language model",
        fix=fix,
    )
