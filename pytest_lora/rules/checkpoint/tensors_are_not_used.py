from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change, noun
from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.saved_tensors import WRAPPERS, Key
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import name_in_keys


@rule("LORA425", severity="error", needs=CheckpointFacts)
def tensors_are_not_used(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The file holds LoRA tensors that nothing looks for.

    ## What it does
    With a base, asks PEFT which tensors it would load. Without one, compares the modules in the file with
    the targets of the configuration.

    ## Why is this bad?
    Tensors that no module takes are dropped without a word: a part of what was trained is lost.

    ## Example
    ```python
    deeper = adapter(num_hidden_layers=4)
    report = check_checkpoint(deeper, base)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter(), base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1932
    - https://github.com/vllm-project/vllm/issues/34186
    """
    if not facts.is_judged or facts.misnamed or not facts.adapted:
        return
    if facts.fit is None:
        yield from _untargeted(facts)
        return
    if facts.fit.wrapper:
        modules = [m.name for m in facts.adapted]
        yield Violation(
            where=grouped(modules),
            observed=f"adapter keys of {_counted(modules)} match nothing: the modules of the live base have "
            f"'{facts.fit.wrapper}.' of {WRAPPERS[facts.fit.wrapper]} in their names, and the keys have not",
            expected="a base whose names are those of the keys",
            fix="load the adapter first and wrap or compile the model then, or load it into the unwrapped modules",
        )
        return
    fit = facts.fits
    unused = fit.unused if fit is not None else ()
    if fit is None or not unused:
        return
    known = set(fit.base.module_names)
    held = {key.peft_name: key.module for key in facts.keys.values()}
    modules = list(dict.fromkeys(held[name] if name in held else Key.of(name).module for name in unused))
    foreign = [m for m in modules if m not in known]
    if foreign:
        yield Violation(
            where=grouped(foreign),
            observed=f"{_counted(foreign)} of the file {'do' if len(foreign) > 1 else 'does'} not exist in "
            f"{fit.base.architecture}: their adapter keys "
            f"match nothing, are unexpected and would be dropped{_layers(foreign)}",
            expected="every tensor to have its place in the base",
            fix=name_in_keys(facts) or "load it on the base that it was trained on",
        )
    if rest := [m for m in modules if m in known]:
        yield Violation(
            where=grouped(rest),
            observed=f"adapter keys of {_counted(rest)} are not used: {_reason(facts, unused)}",
            expected="a configuration under which every tensor of the file is used",
            fix=name_in_keys(facts) or _fix(facts, unused),
        )


def _counted(modules: list[str]) -> str:
    return f"{len(modules)} module{'s' if len(modules) > 1 else ''}"


def _layers(modules: list[str]) -> str:
    numbers = sorted({int(p) for m in modules for p in m.split(".") if p.isdigit() and len(p) < 6})
    return f" (layers {', '.join(map(str, numbers[:8]))})" if numbers else ""


def _reason(facts: CheckpointFacts, unused: tuple[str, ...]) -> str:
    if all("lora_magnitude_vector" in name for name in unused):
        return "they hold DoRA magnitudes, and use_dora is not set"
    return "the configuration does not adapt these modules"


_WITH_DORA = advise("restore the configuration of the training: ", change(use_dora=True))


def _fix(facts: CheckpointFacts, unused: tuple[str, ...]) -> Advice:
    if all("lora_magnitude_vector" in name for name in unused):
        return _WITH_DORA
    return _restore(facts)


def _restore(facts: CheckpointFacts) -> Advice:
    """The targets of the configuration with those of the file, by the last part of their names."""
    settings = facts.settings
    restore = "restore the adapter_config.json that the adapter was trained with"
    if settings is None or not isinstance(settings.target_modules, tuple):
        return advise(restore)
    missed = (module.name for module in facts.adapted if not settings.targets(module.name))
    fields: dict[str, object] = {
        "target_modules": tuple(
            dict.fromkeys((*settings.target_modules, *(n.rpartition(".")[2] for n in missed)))
        )
    }
    if any(settings.skips_layer_of(module.name) for module in facts.adapted):
        fields["layers_to_transform"] = None
    return advise(restore, ", with ", noun(**fields))


def _untargeted(facts: CheckpointFacts) -> Iterator[Violation]:
    settings = facts.settings
    if settings is None:
        return
    if not settings.use_dora and (scaled := [m.name for m in facts.adapted if m.magnitude is not None]):
        yield Violation(
            where=grouped(scaled),
            observed="adapter keys hold DoRA magnitudes, but use_dora is not set: they match nothing and are dropped",
            expected="use_dora=true, as in training",
            fix=_WITH_DORA,
        )
    targets = settings.target_modules
    if not targets or str(targets).lower() == "all-linear" or settings.target_parameters:
        return
    missed = [
        m.name for m in facts.adapted if not settings.targets(m.target) or settings.skips_layer_of(m.name)
    ]
    if settings.ensure_weight_tying and len(missed) == 1:
        return  # PEFT adapts what is tied to a target, too: one output head, or one embedding
    if missed:
        yield Violation(
            where=grouped(missed),
            observed=f"adapter keys of {len(missed)} of {len(facts.adapted)} modules match no name in "
            "target_modules (or its layers): they would be dropped",
            expected="target_modules that name every module in the file",
            fix=_restore(facts),
        )
