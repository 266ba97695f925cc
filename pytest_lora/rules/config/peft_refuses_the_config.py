from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from pytest_lora.changes import Advice, Change, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import NOT_TRIED, ConfigFacts
from pytest_lora.facts.settings import Settings, is_named
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import in_numbers, positive_ranks, without

_DEFAULT_INIT = change("set", init_lora_weights=True)

_FIXES: tuple[tuple[str, Advice], ...] = (
    (
        "ParamWrapper does not support lora_dropout",
        advise("target_parameters take no dropout: ", Change({"lora_dropout": 0.0}, "set lora_dropout=0.0")),
    ),
    (
        "ParamWrapper does not support fan_in_fan_out",
        advise("on target_parameters ", change("set", fan_in_fan_out=False)),
    ),
    (
        "ParamWrapper does not support lora_bias",
        advise("on target_parameters ", change("set", lora_bias=False)),
    ),
    (
        "ParamWrapper does not support use_dora",
        advise("on target_parameters ", change("set", use_dora=False)),
    ),
    (
        "ParamWrapper does not work with DoRA",
        advise("on target_parameters ", change("set", use_dora=False)),
    ),
    (
        "pissa_niter_",
        advise(
            change("write", init_lora_weights="pissa"),
            ", or pissa_niter_16 with a whole number of iterations",
        ),
    ),
    (
        "invalid literal for int()",
        advise(change("write", init_lora_weights="pissa_niter_16"), ", with a whole number of iterations"),
    ),
    (
        "KaSA requires",
        advise("set r (or a rank_pattern for these modules) below the smaller side of the weight"),
    ),
    (
        "MiCA requires",
        advise("set r (or a rank_pattern for these modules) to the smaller side of the weight at most"),
    ),
    (
        "lora_ga_config must",
        advise("set lora_ga_config to a LoraGAConfig, or ", change(init_lora_weights=True)),
    ),
    (
        "variant combination",
        advise("take this kind of layer out of target_modules, or leave the variant of LoRA out"),
    ),
    ("num_groups", advise("set num_groups to a divisor of the inputs of every target")),
    (
        "mat1 and mat2",
        advise(_DEFAULT_INIT, ": this one fits no layers that are stored transposed (Conv1D)"),
    ),
    (
        "ParamWrapper",
        advise(
            "target_parameters take plain LoRA alone: ",
            change("set", target_parameters=None),
            ", or leave the rest out",
        ),
    ),
    (
        "already marked to be trained fully",
        advise("train the embedding in one way: ", change("set", trainable_token_indices=None)),
    ),
    (
        "Unknown initialization",
        advise(_DEFAULT_INIT, ", or to a method that this version of PEFT knows"),
    ),
    (
        "has no attribute 'endswith'",
        advise("bias takes the words 'none', 'all' and 'lora_only': ", change("set", bias="none")),
    ),
    (
        "Requested bias",
        advise(change("set", bias="none"), ", or ", change(bias="all"), ", or ", change(bias="lora_only")),
    ),
    ("DoRA", advise(change("set", use_dora=False))),
    ("lora_bias", advise(change("set", lora_bias=False))),
    (
        "preprocess_corda",
        advise("call preprocess_corda of PEFT first, which needs data; or ", _DEFAULT_INIT),
    ),
    (
        "megatron",
        advise("without a base that is built with Megatron ", change("set", megatron_config=None)),
    ),
    (
        "is out of range",
        advise(
            "set layer_replication to ranges [start, end) of blocks of the base, or ",
            change(layer_replication=None),
        ),
    ),
)
"""Words of PEFT's messages, and what to write."""

_PLAIN = {"lora_dropout": 0.0, "fan_in_fan_out": False, "lora_bias": False, "use_dora": False}
"""Fields that PEFT refuses on a parameter (``lora.ParamWrapper``), and their values in plain LoRA."""


@rule("LORA124", severity="error", needs=ConfigFacts, on_saved="with_base")
def peft_refuses_the_config(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """PEFT refuses this configuration.

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
    if "ParamWrapper" in message and not facts.settings.target_parameters:
        about += ": the experts of this base are fused parameters and no modules, which names of them mean"
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
    no_such_layer = bool(layers and facts.blocks) and not layers & set(facts.blocks)
    rows = [row for _, group in settings.trainable_token_indices for row in group]
    no_such_row = base.vocab_size is not None and any(row >= base.vocab_size for row in rows)
    odd_rank = "Orthogonal initialization requires" in str(facts.refusal)
    no_head = "prepare_inputs_for_generation" in str(facts.refusal) and base.fitting_task_type is not None
    return nothing_found or no_such_layer or no_such_row or odd_rank or no_head


def _fix(facts: ConfigFacts, message: str) -> Advice:
    settings, refusal = facts.settings, facts.refusal
    if refusal is not None and refusal.error == NOT_TRIED:
        return advise(f"write plain names of modules, and few of them, in {message.partition(':')[0]}")
    if refusal is not None and refusal.exclusion is not None:
        names = refusal.exclusion if isinstance(refusal.exclusion, str) else list(refusal.exclusion)
        return advise(change("set", exclude_modules=names), ", with which PEFT takes the rest")
    if broken := facts.repairs.broken:
        mended = _mended_pattern(settings, *broken, facts.repairs.mended)
        return advise(f"{broken[1]!r} is no regular expression: ", mended)
    if settings.r <= 0 or any(rank <= 0 for _, rank in settings.rank_pattern):
        return advise("a rank is a whole number above 0: ", positive_ranks(settings))
    if "instances of 'str'" in message or "tuple of ints" in message:
        return advise("write numbers, not text, and a whole number for r: ", in_numbers(settings))
    if "incompatible with Mamba-based" in message:
        why = "kernels of these models read the weights of such modules and never call them, nor an adapter: "
        return advise(why, _without_those_of(message, facts))
    if "layers_pattern" in message:
        named = ", or to the name of the list that holds the blocks, such as 'layers'"
        return advise(change("set", layers_pattern=None), named)
    if "`layers_to_transform` cannot be used" in message:
        return advise("say the layers in the pattern and ", change("set", layers_to_transform=None))
    if "No modules were targeted" in message or "All modules were excluded" in message:
        return advise("exclude_modules and modules_to_save leave no target to adapt: ", _emptied(facts))
    if "is not supported" in message:
        return advise("name linear, embedding or convolution layers themselves: ", _supported(facts))
    if not settings.target_modules and "target_modules" in message:
        return advise(change("set", target_modules="all-linear"))
    if groups := re.search(r"groups=(\d+) and rank (\d+)", message):
        multiple = math.ceil(int(groups[2]) / int(groups[1])) * int(groups[1])
        return advise(
            "set r, or a rank_pattern for these modules, to a multiple of their groups: ", change(r=multiple)
        )
    if "trainable_token_indices cannot" in message:
        no_rows = change("set", trainable_token_indices=None)
        return advise("adapt the embedding in one way: ", no_rows, _without_embedding(facts))
    if "ParamWrapper" in message and (refused := _refused_on_parameters(message)):
        return advise("fused experts take plain LoRA alone: ", refused)
    rows = settings.trainable_token_indices
    if unknown := next((name for name, _ in rows if name and not _is_there(name, facts)), None):
        return advise(
            "name the embedding as this base does: ", _renamed(unknown, facts), f", not {unknown!r}"
        )
    return next((fix for words, fix in _FIXES if words in message), _named_in(message))


def _refused_on_parameters(message: str) -> Change | None:
    fields: dict[str, object] = {field: plain for field, plain in _PLAIN.items() if field in message}
    return change("set", **fields) if fields else None


def _named_in(message: str) -> Advice:
    fields = [
        field.name for field in dataclasses.fields(Settings) if len(field.name) > 1 and field.name in message
    ]
    if not fields:
        return advise("change what the message of PEFT names")
    return advise(f"leave {' or '.join(fields)} at its default")


def _mended_pattern(settings: Settings, field: str, text: str, mended: str | None) -> Change:
    """The field with the pattern mended; without it where it could not be."""
    if field.endswith("_pattern"):
        pairs = [(mended if key == text else key, value) for key, value in getattr(settings, field)]
        return change(**{field: {key: value for key, value in pairs if key is not None}})
    return change(**{field: mended or ("all-linear" if field == "target_modules" else None)})


def _without_those_of(message: str, facts: ConfigFacts) -> Change:
    """The targets without the modules that the end of PEFT's message lists."""
    leaves = re.findall(r"'(\w+)'", message.rpartition("Incompatible modules:")[2])
    names = facts.settings.target_modules
    kept = [n for n in names if n.rpartition(".")[2] not in leaves] if isinstance(names, tuple) else []
    return change(target_modules=kept) if kept else change(exclude_modules=sorted(leaves))


def _emptied(facts: ConfigFacts) -> Change:
    """The lists that take targets away, without what takes them."""
    settings, fields = facts.settings, dict[str, object]()
    if settings.exclude_modules:
        fields["exclude_modules"] = None
    targets = [module.name for module in facts.base.modules if settings.targets(module.name)]
    saved = [n for n in settings.modules_to_save if any(n in module.split(".") for module in targets)]
    if saved or not fields:
        fields["modules_to_save"] = without(settings.modules_to_save, *saved)
    return change(**fields)


def _supported(facts: ConfigFacts) -> Advice:
    """The targets with the linear layers inside them instead of blocks, and without norms."""
    targets = facts.settings.target_modules
    linear = [module for module in facts.base.modules if module.is_linear]
    if not isinstance(targets, tuple):
        return advise("with a pattern that fits them alone, or ", change(target_modules="all-linear"))
    names: list[str] = []
    for target in targets:
        blocks = [m for m in facts.base.module_names if is_named(m, target)]
        inside = {m.leaf for m in linear if any(m.name.startswith(f"{block}.") for block in blocks)}
        own = any(module.name in blocks for module in linear) or "embed" in target
        names += [target] if own else sorted(inside)
    kept = tuple(dict.fromkeys(names))
    return advise(change(target_modules=kept or "all-linear"))


def _without_embedding(facts: ConfigFacts) -> Advice:
    targets = facts.settings.target_modules
    embedding = facts.base.input_embeddings or ""
    if not isinstance(targets, tuple):
        return advise()
    rest = without(targets, *(name for name in targets if is_named(embedding, name)))
    return advise(", or ", change(target_modules=rest)) if rest and rest != targets else advise()


def _renamed(name: str, facts: ConfigFacts) -> Change:
    embedding = facts.base.input_embeddings or "embed_tokens"
    written: dict[str, set[int]] = {}
    for known, rows in facts.settings.trainable_token_indices:
        written.setdefault(embedding if known == name else known, set()).update(rows)
    return change(trainable_token_indices={known: sorted(rows) for known, rows in written.items()})


def _is_there(name: str, facts: ConfigFacts) -> bool:
    return any(is_named(module, name) for module in facts.base.module_names)
