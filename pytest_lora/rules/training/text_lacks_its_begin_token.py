from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

ENOUGH = 2
"""Rows that a verdict needs: a single one may go on where another broke off."""


@rule("LORA382", severity="warning", needs=TrainingFacts)
def text_lacks_its_begin_token(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Texts of a Gemma model have no begin token (BOS).

    ## What it does
    Looks, for causal models of the Gemma family, for rows of which none holds `bos_token_id` anywhere. Other families
    do without one, or have none.

    ## Why is this bad?
    Gemma was never trained on a text without `<bos>` at its beginning, and gives nonsense for one: the loss starts many
    times higher, and the adapter learns to make up for the missing token instead of its task. Chat templates write it
    into the text; where code cuts it off again, trusting the tokenizer to add it, and `add_special_tokens=False` is set
    too, it is gone.

    ## Example
    ```python
    from transformers import GemmaConfig, GemmaForCausalLM
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
    base = GemmaForCausalLM(GemmaConfig(vocab_size=128, intermediate_size=128, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    from transformers import GemmaConfig, GemmaForCausalLM
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
    base = GemmaForCausalLM(GemmaConfig(vocab_size=128, intermediate_size=128, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["input_ids"][:, 0] = batch["labels"][:, 0] = model.config.bos_token_id
    report = check_training(model, batch)
    ```

    ## References
    - https://unsloth.ai/blog/gemma-bugs
    - https://github.com/huggingface/trl/issues/1709
    """
    known = [k for k in facts.labels if k.kind == "causal" and k.bounds.opens is not None]
    rows = sum(k.rows for k in known)
    if rows >= ENOUGH and not any(k.bounds.opened for k in known):
        yield Violation(
            where=f"{named_batches(known)}: input_ids",
            observed=f"none of {rows} rows holds the begin token {known[0].bounds.opens} (bos_token_id)",
            expected="one begin token before each text: Gemma gives nonsense without it",
            fix="tokenize plain text with add_special_tokens=True, and leave the begin token that a chat template "
            "writes where it is",
        )
