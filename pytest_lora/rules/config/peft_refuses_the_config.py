from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, Settings, compiled, is_named
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

_FIXES = (
    ("ParamWrapper", "target_parameters take plain LoRA alone: leave out what the message names"),
    (
        "pissa_niter_",
        "write init_lora_weights='pissa', or 'pissa_niter_16' with a whole number of iterations",
    ),
    (
        "invalid literal for int()",
        "write init_lora_weights='pissa_niter_16', with a whole number of iterations",
    ),
    ("KaSA requires", "set r (or a rank_pattern for these modules) below the smaller side of the weight"),
    (
        "MiCA requires",
        "set r (or a rank_pattern for these modules) to the smaller side of the weight at most",
    ),
    ("lora_ga_config must", "set lora_ga_config=LoraGAConfig()"),
    (
        "variant combination",
        "take this kind of layer out of target_modules, or leave the variant of LoRA out",
    ),
    ("num_groups", "set num_groups to a divisor of the inputs of every target"),
    (
        "mat1 and mat2",
        "leave init_lora_weights at its default: this one fits no layers that are stored transposed (Conv1D)",
    ),
    ("Unknown initialization", "set init_lora_weights=True, or to a method that this version of PEFT knows"),
    (
        "trainable_token_indices cannot",
        "take the embedding out of target_modules, or leave its rows to the adapter",
    ),
    ("divisible by groups", "set r, or a rank_pattern for these modules, to a multiple of their groups"),
    ("Requested bias", "set bias to 'none', 'all' or 'lora_only'"),
    ("DoRA", "set use_dora=False, or take these modules out of target_modules"),
    ("preprocess_corda", "call preprocess_corda(base, config, run_model=...) before get_peft_model"),
    ("megatron", "leave megatron_config out, unless the base is built with Megatron"),
    ("instances of 'str'", "write r, lora_alpha and the values of both patterns as numbers, not as text"),
    ("tuple of ints", "set r to a whole number"),
    ("is out of range", "set layer_replication to ranges [start, end) of blocks that the base has"),
)
"""Words of PEFT's messages that do not say what to write instead, and what to write."""


@rule("LORA124", severity="error", needs=ConfigFacts, on_saved="with_base")
def peft_refuses_the_config(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """PEFT stops at this configuration.

    ## What it does
    Lets PEFT put the adapter on the structure of the base and reports its error, unless another rule
    explains it.

    ## Why is this bad?
    `get_peft_model` would raise the same error, after the base has been loaded.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["input_layernorm"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    refusal = facts.refusal
    if refusal is None or facts.base.carries_adapter or _explained_elsewhere(facts):
        return
    message = re.sub(r"\(.*\) is not supported", "(...) is not supported", " ".join(refusal.message.split()))
    about = f"; on {grouped(refusal.modules)}" if refusal.modules else ""
    on_meta_alone = "meta tensor" in message or "meta device" in message
    yield Violation(
        where=f"LoraConfig on {facts.base.architecture}",
        observed=f"{refusal.error}: {message[:300]}{about}",
        expected="a configuration that PEFT accepts for this base",
        fix=_fix(facts, message),
        severity="info" if on_meta_alone else "error",
    )


def _explained_elsewhere(facts: ConfigFacts) -> bool:
    settings, base = facts.settings, facts.base
    unmatched = any(facts.unmatched("target_modules")) or any(facts.unmatched("target_parameters"))
    nothing_found = unmatched and not (facts.refusal and facts.refusal.modules)
    layers = set(settings.layers_to_transform)
    no_such_layer = bool(layers and base.layer_indices) and not layers & set(base.layer_indices)
    rows = [row for _, group in settings.trainable_token_indices for row in group]
    no_such_row = base.vocab_size is not None and any(row >= base.vocab_size for row in rows)
    odd_rank = "Orthogonal initialization requires" in str(facts.refusal)
    cannot_generate = "prepare_inputs_for_generation" in str(facts.refusal) and base.task_type is not None
    return nothing_found or no_such_layer or no_such_row or odd_rank or cannot_generate


def _fix(facts: ConfigFacts, message: str) -> str:
    settings, refusal = facts.settings, facts.refusal
    if refusal is not None and refusal.exclusion is not None:
        names = refusal.exclusion if isinstance(refusal.exclusion, str) else list(refusal.exclusion)
        return f"set exclude_modules={names!r}, with which PEFT takes the rest"
    if broken := _broken_pattern(settings):
        return (
            f"{broken[0]}: {broken[1]!r} is no regular expression; write the end of a module's name, or '.*'"
        )
    if settings.r <= 0 or any(rank <= 0 for _, rank in settings.rank_pattern):
        return "set r, and every rank in rank_pattern, to a whole number above 0"
    if "layers_pattern" in message:
        return "drop layers_pattern, or write the name of the list that holds the blocks, such as 'layers'"
    if "No modules were targeted" in message or "All modules were excluded" in message:
        return "exclude_modules and modules_to_save leave no target to adapt: take the targets out of them"
    if "is not supported" in message:
        return "name linear, embedding or convolution layers themselves, not norms or the blocks around them"
    if not settings.target_modules and "target_modules" in message:
        return "set target_modules, for instance to 'all-linear'"
    unknown = [name for name, _ in settings.trainable_token_indices if name and not _is_there(name, facts)]
    if unknown:
        embedding = facts.base.input_embeddings or "embed_tokens"
        return f"trainable_token_indices: name the embedding as this base does: {embedding!r}, not {unknown[0]!r}"
    return next((fix for words, fix in _FIXES if words in message), "change what the message names")


def _broken_pattern(settings: Settings) -> tuple[str, str] | None:
    """The field and the text of the first regular expression that is none."""
    written: list[tuple[str, str]] = []
    for field in ("rank_pattern", "alpha_pattern"):
        written += [(field, key) for key, _ in getattr(settings, field)]
    for field in ("target_modules", "exclude_modules"):
        value = getattr(settings, field)
        written += [(field, value)] if isinstance(value, str) else []
    return next(((field, text) for field, text in written if compiled(text) is None), None)


def _is_there(name: str, facts: ConfigFacts) -> bool:
    return any(is_named(module, name) for module in facts.base.module_names)
