"""What the rules on servers share: which features a server treats otherwise than PEFT, and what to do about each."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change, noun
from pytest_lora.expect import Expect
from pytest_lora.facts.served import ServedAdapter, padded
from pytest_lora.facts.servers import SERVERS, Feature, Outcome, Server, Treatment
from pytest_lora.facts.settings import Settings, alpha_divisor
from pytest_lora.rules import Violation

_MERGE = "merge the adapter into the base (merge_and_unload), and serve the merged model"
_AGAIN = "train again without it, or " + _MERGE
_FOLD = (
    "multiply each lora_B by the scaling that PEFT uses there, and write lora_alpha equal to r without use_rslora and "
    "without patterns; or " + _MERGE
)

NAMES: dict[Feature, str] = {
    "dora": "DoRA",
    "bias": "biases of the base",
    "lora_bias": "a bias of lora_B",
    "saved_modules": "modules saved in full",
    "task_head": "a task head",
    "whole_embeddings": "embeddings saved in full",
    "token_rows": "trained token rows",
    "rslora": "rsLoRA",
    "rank_pattern": "ranks of their own",
    "alpha_pattern": "alphas of their own",
    "ranks_by_layer": "ranks that differ between layers",
    "padded_rank": "a rank that it pads",
    "target_pattern": "a pattern for target_modules",
    "embedding": "LoRA on an embedding",
    "head": "LoRA on the output head",
    "tied_head": "LoRA on a tied output head",
    "experts": "LoRA on fused experts",
    "convolution": "LoRA on a convolution",
    "vision": "LoRA on the vision tower",
    "layers_in_part": "a target on some of the layers",
    "attention_in_part": "attention without q_proj or v_proj",
    "unconverted_init": "an initialisation that rewrites the base",
    "alora": "an activated adapter (aLoRA)",
    "structure": "a field that changes the structure",
    "no_prefix": "keys without base_model.model.",
    "adapter_in_keys": "keys with the name of the adapter",
    "pickle": "a pickle",
    "target": "a target that it does not know",
}

FIXES: dict[Feature, str | Advice] = {
    "dora": _MERGE,
    "bias": advise("train again with ", noun(bias="none"), f", or {_MERGE}"),
    "lora_bias": advise("train again with ", noun(lora_bias=False), f", or {_MERGE}"),
    "whole_embeddings": "save with save_embedding_layers=False if they were not trained; else " + _MERGE,
    "rank_pattern": "pad lora_A and lora_B with zeros to one rank, and " + _FOLD,
    "ranks_by_layer": "pad lora_A and lora_B with zeros to one rank, and " + _FOLD,
    "padded_rank": "pad lora_A and lora_B with zeros to {padded}, and write r={padded} and lora_alpha={alpha:g}; "
    "nothing else changes",
    "alpha_pattern": _FOLD,
    "target_pattern": "write the names of the modules in place of the pattern: target_modules={leaves}",
    "experts": "convert it to one lora_A and lora_B for each expert and projection, or " + _MERGE,
    "vision": "start it with --enable-tower-connector-lora where the model has it, or " + _MERGE,
    "layers_in_part": "add lora_A and lora_B of zeros for the layers that have none, or " + _MERGE,
    "attention_in_part": "add lora_A and lora_B of zeros for the projections that have none, or " + _MERGE,
    "unconverted_init": "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
    "no_prefix": "put base_model.model. before every key",
    "adapter_in_keys": "take the name out of the keys; save_pretrained of the PeftModel writes none",
    "pickle": "save it with safe_serialization=True",
}
"""What to do, where that is not to train again or to merge."""


def treated(adapter: ServedAdapter, expect: Expect, outcome: Outcome) -> Iterator[Violation]:
    """A violation for each feature of which the server makes this."""
    if expect.serve is None or adapter.settings is None:
        return
    server = SERVERS[expect.serve]
    for feature, where in _features(adapter, server).items():
        treatment = server.features.get(feature)
        if treatment is not None and treatment.outcome == outcome:
            yield _violation(adapter, adapter.settings, server, feature, treatment, where)


def shown(names: tuple[str, ...], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _features(adapter: ServedAdapter, server: Server) -> dict[Feature, tuple[str, ...]]:
    """What the adapter has, with the targets that this server has no layers for."""
    unknown = tuple(
        dict.fromkeys(
            module.leaf
            for module in adapter.modules
            if server.targets and module.kind == "linear" and module.leaf not in server.targets
        )
    )
    found = dict(adapter.features)
    if unknown:
        found["target"] = unknown
    if (
        "ranks_by_layer" in found and "ranks_by_layer" in server.features
    ):  # the same ranks, and they are refused
        found.pop("padded_rank", None)
        found.pop("rank_pattern", None)
    return found


_VERBS: dict[Outcome, str] = {
    "refuses": "refuses",
    "drops": "drops",
    "rescales": "scales otherwise than PEFT:",
}


def _violation(
    adapter: ServedAdapter,
    settings: Settings,
    server: Server,
    feature: Feature,
    treatment: Treatment,
    where: tuple[str, ...],
) -> Violation:
    names = shown(tuple(dict.fromkeys(where)))
    return Violation(
        where=f"{adapter.name}, for {server.title}",
        observed=f"{server.name} {_VERBS[treatment.outcome]} {NAMES[feature]} ({names}): it {treatment.reason}",
        expected="an adapter that the server applies as PEFT does",
        fix=_fix(adapter, settings, feature),
        severity="warning" if treatment.warns else None,
    )


def _fix(adapter: ServedAdapter, settings: Settings, feature: Feature) -> str | Advice:
    if feature == "rslora" and not {"rank_pattern", "alpha_pattern"} & set(adapter.features):
        alpha = settings.lora_alpha * settings.r**0.5
        fields = change("write", use_rslora=False, lora_alpha=alpha)
        return advise("in adapter_config.json ", fields, ": the same scaling without rsLoRA")
    if feature == "rslora":
        return _FOLD
    fix = FIXES.get(feature, _AGAIN)
    if isinstance(fix, Advice) or "{" not in fix:
        return fix
    wanted = padded(adapter.highest_rank)
    scaling = settings.lora_alpha / alpha_divisor(settings.r, rslora=settings.use_rslora)
    alpha = scaling * alpha_divisor(wanted, rslora=settings.use_rslora)
    leaves = sorted({module.leaf for module in adapter.modules})
    return fix.format(padded=wanted, alpha=alpha, leaves=leaves)
