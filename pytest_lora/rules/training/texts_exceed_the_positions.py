from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA381", severity="warning", needs=TrainingFacts)
def texts_exceed_the_positions(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Texts are longer than the positions that the base was trained for.

    ## What it does
    Compares the longest text of a batch, without its padding, with `max_position_embeddings` of a causal model with
    rotary positions. Of packed rows with restarting `position_ids` the longest document counts. A base whose positions
    are rescaled (`rope_parameters` of the type linear, dynamic, yarn, ...) is made to go further and not judged.
    Learned positions raise by themselves (LORA319).

    ## Why is this bad?
    Rotary positions go on beyond the last one that the base has seen, without an error, and attention there was never
    trained: the loss of those tokens is that of a confused model, and its gradients drown the rest. Servers refuse such
    texts.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.max_position_embeddings = 12
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.max_position_embeddings = 12
    batch = {name: values[:, :12] for name, values in batch.items()}
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main/en/internal/rope_utils
    - Position interpolation, on what lies beyond: https://arxiv.org/abs/2306.15595
    """
    known = [k for k in facts.labels if k.bounds.positions and k.bounds.furthest > k.bounds.positions]
    if known and expect.purpose == "train":
        positions = known[0].bounds.positions
        yield Violation(
            where=f"{named_batches(known)}: input_ids",
            observed=f"texts of up to {max(k.bounds.furthest for k in known):,} tokens, and the base was trained for "
            f"{positions:,} positions (max_position_embeddings)",
            expected=f"{positions:,} tokens a text or fewer, or positions that are rescaled for more",
            fix=f"cut or divide the texts: batch = {{n: v[:, :{positions}] for n, v in batch.items()}}, best with "
            f"max_length={positions} of the tokenizer; for longer ones load the base with rope_parameters of the type "
            "'yarn' or 'linear'",
        )
