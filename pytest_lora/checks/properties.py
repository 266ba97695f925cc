"""Three properties of adapters that a test may pin down to a number: share of parameters, scaling, shapes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_lora.findings import Finding, Report, Severity, grouped

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from pytest_lora.facts.model import Factor, LayerState
    from pytest_lora.facts.training import TrainingFacts, UpdateFacts
    from pytest_lora.inspection.survey import Survey
    from pytest_lora.inspection.training import LossFn

RATIO = ("LORA901", "parameter_ratio_outside_band")
SCALING = ("LORA902", "scaling_differs_from_expected")
SHAPES = ("LORA903", "adapter_shapes_do_not_fit")
TOLERANCE = 1e-6
"""Relative difference below which two scalings are the same; they are quotients of doubles."""


def parameter_ratio(model: nn.Module, low: float, high: float) -> Report:
    """Compare the share of trainable among all logical parameters with a band.

    Raises:
        TypeError: ``model`` carries no LoRA layers, or a bound is no number.
        ValueError: The band is no part of 0 to 1.
    """
    for name, bound in (("low", low), ("high", high)):
        _require_number(name, bound)
        if not 0 <= bound <= 1:
            raise ValueError(f"{name} must be a fraction from 0 to 1 (0.01 is 1 %), not {bound!r}")
    if low > high:
        raise ValueError(f"low must not be above high, but low={low!r} and high={high!r}")

    from pytest_lora.counting import count_parameters
    from pytest_lora.inspection.model import adapted_survey

    subject = _subject(model, adapted_survey(model))
    counted = count_parameters(model)
    if low * counted.total <= counted.trainable <= high * counted.total:
        return Report(subject)
    observed = f"{counted.trainable:,} of {counted.total:,} parameters are trainable: {counted.percent:.4g} %"
    if counted.packed:
        observed += (
            f" (a count of the {counted.stored:,} stored numbers, 4-bit weights packed, "
            f"prints {counted.stored_percent:.4g} %)"
        )
    if not counted.trainable:
        fix = "make the adapter trainable: PeftModel.from_pretrained(..., is_trainable=True)"
    elif counted.trainable < low * counted.total:
        fix = "raise r, adapt more modules, or lower low if so few are meant"
    elif counted.trainable > counted.adapter:
        fix = "freeze the base: more trains than the adapters hold"
    else:
        fix = "lower r, adapt fewer modules, or raise high if so many are meant"
    expected = f"{100 * low:g} % to {100 * high:g} % (low={low!r}, high={high!r})"
    return Report(subject, (Finding(*RATIO, "error", type(model).__name__, observed, expected, fix),))


class _Scaled(NamedTuple):
    """One value of the effective scaling and where it comes from."""

    scaling: float
    alpha: float
    rank: int
    use_rslora: bool

    @property
    def configured(self) -> float:
        """``alpha / r``, under rsLoRA ``alpha / sqrt(r)`` (arXiv:2106.09685, arXiv:2312.03732)."""
        return self.alpha / self.divisor

    @property
    def divisor(self) -> float:
        return math.sqrt(self.rank) if self.use_rslora else self.rank

    def __str__(self) -> str:
        formula = f"alpha {self.alpha:g} / {'sqrt(' if self.use_rslora else ''}rank {self.rank}"
        formula += ")" if self.use_rslora else ""
        if not math.isclose(self.scaling, self.configured, rel_tol=TOLERANCE):
            return f"scaling {self.scaling:g}, though {formula} is {self.configured:g}"
        return f"scaling {self.scaling:g} ({formula})"

    def fix(self, expected: float) -> str:
        if math.isclose(self.configured, expected, rel_tol=TOLERANCE):
            return "undo what changed the scaling (scale_layer, set_scale) with unscale_layer"
        return (
            f"an alpha of {expected * self.divisor:g} (lora_alpha, or alpha_pattern for single modules), "
            f"or expected={self.scaling:g} if this is meant"
        )


def scaling(model_or_config: nn.Module | LoraConfig, expected: float) -> Report:
    """Compare the effective scaling of every adapted module with one number.

    Raises:
        TypeError: ``model_or_config`` is neither a ``LoraConfig`` nor a model with LoRA layers, or
            ``expected`` is no number.
        ValueError: ``expected`` is not finite or not above 0, or a configured rank is below 1.
    """
    _require_number("expected", expected)
    if not math.isfinite(expected) or expected <= 0:
        raise ValueError(f"expected must be a finite number above 0, not {expected!r}")

    from torch import nn

    from pytest_lora.inspection.model import adapted_survey
    from pytest_lora.inspection.peft_internals import LoraConfig

    found: dict[_Scaled, list[str]] = {}
    if isinstance(model_or_config, LoraConfig):
        subject = "LoraConfig"
        for name, value in _configured(model_or_config):
            found.setdefault(value, []).append(name)
        where: Callable[[Iterable[str]], str] = ", ".join
    else:
        if not isinstance(model_or_config, nn.Module):
            raise TypeError(
                "model_or_config must be a model with LoRA layers or a LoraConfig, "
                f"not {type(model_or_config).__name__}"
            )
        found_layers = adapted_survey(model_or_config)
        subject, where = _subject(model_or_config, found_layers), grouped
        for layer in _layers(found_layers):
            key = _Scaled(layer.scaling, layer.alpha, layer.rank, layer.use_rslora)
            found.setdefault(key, []).append(layer.module)
    findings = (
        Finding(
            *SCALING,
            "error",
            where(dict.fromkeys(modules)),
            str(value),
            f"scaling {expected:g} (expected={expected!r})",
            value.fix(expected),
        )
        for value, modules in found.items()
        if not math.isclose(value.scaling, expected, rel_tol=TOLERANCE)
    )
    return Report(subject, tuple(findings))


def _configured(config: LoraConfig) -> Iterator[tuple[str, _Scaled]]:
    """The scaling without a pattern, and that of every pattern key; a key in one pattern has one default."""
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    rslora = bool(config.use_rslora)
    for key in (None, *dict.fromkeys([*ranks, *alphas])):
        rank = int(config.r if key is None else ranks.get(key, config.r))
        alpha = float(config.lora_alpha if key is None else alphas.get(key, config.lora_alpha))
        if rank < 1:
            raise ValueError(f"model_or_config: a rank must be at least 1, but one is {rank}")
        divisor = math.sqrt(rank) if rslora else rank
        name = "modules without a pattern" if key is None else f"modules of pattern {key!r}"
        yield name if ranks or alphas else "all modules", _Scaled(alpha / divisor, alpha, rank, rslora)


class Trial(NamedTuple):
    """Steps to take before ranks are compared.

    Attributes:
        batch: One batch or an iterable of batches.
        steps: Optimizer steps.
        rate: Learning rate of the AdamW that takes them.
        loss_fn: Makes the loss; by default the model does.
    """

    batch: Mapping[str, Any] | Iterable[Any]
    steps: int
    rate: float
    loss_fn: LossFn | None


def adapter_shapes(
    model: nn.Module, targets: str | Iterable[str] | None, trial: Trial | None = None
) -> Report:
    """Compare the factors of every adapter with rank and base weight, and what is adapted with ``targets``.

    With a trial, also the rank of what some real steps change with the rank of the adapter; no step is taken where a
    shape does not fit, as that model can not run.

    Raises:
        TypeError: ``model`` carries no LoRA layers, ``targets`` is neither a pattern nor names, or the batches have
            another form.
        ValueError: ``targets`` is empty or no regular expression, there is no batch, or the model gives no loss.
    """
    wanted = _require_targets(targets)

    from pytest_lora.inspection.model import adapted_survey

    found = adapted_survey(model)
    layers = _layers(found)
    findings = [*_misfits(layers)]
    if trial is not None and not findings:
        findings += _update_ranks(model, trial)
    if wanted is not None:
        findings += _astray(found, {layer.module for layer in layers}, wanted)
    return Report(_subject(model, found), tuple(findings))


def _misfits(layers: Iterable[LayerState]) -> Iterator[Finding]:
    wrong: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        for factor, expected in ((layer.a, layer.expected_a), (layer.b, layer.expected_b)):
            if factor.shape[:2] != expected or len(factor.shape) < 2:
                asked = (
                    f"{expected[0]} x {expected[1]}: rank {layer.rank}"
                    + (f" for each of {layer.experts} experts" if layer.experts > 1 else "")
                    + f", base {layer.in_features} -> {layer.out_features}"
                )
                wrong.setdefault((_shape(factor), asked), []).append(layer.module)
    for (observed, asked), modules in wrong.items():
        fix = "build the adapter on this base with this rank; weights of another one were put in"
        yield Finding(*SHAPES, "error", grouped(modules), observed, asked, fix)


def _update_ranks(model: nn.Module, trial: Trial) -> Iterator[Finding]:
    """Take the steps, and compare the rank of each update with that of its adapter."""
    from pytest_lora.inspection.training import Plan, training_facts

    plan = Plan(steps=trial.steps, rate=trial.rate, loss_fn=trial.loss_fn, ranks=True)
    facts = training_facts(model, trial.batch, plan)
    grouping: dict[tuple[Severity, str, str, str], list[str]] = {}
    for update in facts.updates:
        if (judged := _judged(update, len(facts.steps))) is not None:
            grouping.setdefault(judged, []).append(update.module)
    for (severity, observed, expected, fix), modules in grouping.items():
        yield Finding(*SHAPES, severity, grouped(modules), observed, expected, fix)
    if not any(update.norm > 0 for update in facts.updates) and not any(g[0] == "error" for g in grouping):
        observed = f"no adapter moved in {len(facts.steps)} steps, so nothing is shown of its rank"
        fix = f"{_why_still(facts)}; check_training says more"
        yield Finding(*SHAPES, "error", type(model).__name__, observed, "an update of low rank", fix)


def _judged(update: UpdateFacts, steps: int) -> tuple[Severity, str, str, str] | None:
    """What is to be said of one update: severity, observed, expected, fix; None for a healthy one."""
    why = "r" if update.from_zero else "2 r, as B @ A was not zero before"
    expected = f"rank {update.allowed} at most ({why}), on a base weight that stays as it is"
    moved = "the base weight underneath moved" if update.base_moved else ""
    thaw = "freeze the base weight: only the adapter is to train (get_peft_model sees to that)"
    if update.rank is not None and update.rank > update.allowed:
        observed = f"the update of {steps} steps has rank {update.rank}, allowed is {update.allowed}"
        fix = thaw if moved else "look for what else writes into this weight or into the factors"
        return "error", f"{observed}; {moved}" if moved else observed, expected, fix
    if moved:
        return "error", moved, expected, thaw
    if update.unknown:
        fix = "nothing, if this is meant"
        return "info", f"the rank of the update was not measured: {update.unknown}", expected, fix
    return None


def _why_still(facts: TrainingFacts) -> str:
    if not facts.steps:
        return "give a batch whose labels and tokens exist in the vocabulary: no step could be taken"
    return "make the adapter trainable and active, and give a batch with labels that count"


def _shape(factor: Factor) -> str:
    return f"{factor.name} is {' x '.join(map(str, factor.shape))}"


def _astray(found: Survey, adapted: set[str], wanted: str | tuple[str, ...]) -> Iterator[Finding]:
    names = list(dict.fromkeys([*(name for name in found.modules if name), *adapted]))
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        meant, unknown = list(_all_linear(found)), []
    elif isinstance(wanted, str):
        pattern = re.compile(wanted)
        meant = [name for name in names if _adaptable(found, adapted, name) and pattern.fullmatch(name)]
        unknown = [] if meant else [wanted]
    else:
        by_name = {w: [name for name in names if name == w or name.endswith(f".{w}")] for w in wanted}
        meant = list(dict.fromkeys(name for members in by_name.values() for name in members))
        unknown = [w for w, members in by_name.items() if not members]
    told = f"targets={wanted!r}" if isinstance(wanted, str) else f"targets={list(wanted)!r}"
    leaves = sorted({name.rpartition(".")[2] for name in names})
    for word in unknown:
        similar = difflib.get_close_matches(word.rpartition(".")[2], leaves)
        fix = f"perhaps {' or '.join(map(repr, similar))} was meant" if similar else f"correct {told}"
        yield Finding(*SHAPES, "error", told, f"{word!r} names no module of the base", "a module", fix)
    if missing := [name for name in meant if name not in adapted]:
        fix = "add them to target_modules, or take them out of targets"
        yield Finding(*SHAPES, "error", grouped(missing), "missing: no adapter here", f"one ({told})", fix)
    if unexpected := [name for name in names if name in adapted and name not in set(meant)]:
        fix = "take them out of target_modules, or add them to targets"
        observed = "unexpected: there is an adapter here"
        yield Finding(*SHAPES, "error", grouped(unexpected), observed, f"none ({told})", fix)


def _all_linear(found: Survey) -> Iterator[str]:
    """What PEFT's "all-linear" takes: every linear module but the output embedding and trained heads."""
    from pytest_lora.inspection.base import base_facts, base_parameters

    facts = base_facts(found, base_parameters(found))
    kept = {facts.output_embeddings, *found.saved}
    yield from (m.name for m in facts.modules if m.is_linear and m.name not in kept)


def _adaptable(found: Survey, adapted: Collection[str], name: str) -> bool:
    from pytest_lora.inspection.base import logical_shape

    return name in adapted or logical_shape(found.modules[name]) is not None


def _layers(found: Survey) -> tuple[LayerState, ...]:
    from pytest_lora.inspection.layers import layer_states

    return tuple(layer_states(found.lora))


def _subject(model: nn.Module, found: Survey) -> str:
    return f"{type(model).__name__} of {type(found.root).__name__}"


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")


def _require_targets(targets: Any) -> str | tuple[str, ...] | None:
    if targets is None:
        return None
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets: {targets!r} is no regular expression: {error}") from error
        names: tuple[Any, ...] = (targets,)
    elif isinstance(targets, Iterable):
        names = tuple(targets)
    else:
        raise TypeError(f"targets must be module names or a regular expression, not {targets!r}")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"targets must be module names, but one is {wrong[0]!r}")
    if not names or "" in names:
        raise ValueError(f"targets must not be empty, got {targets!r}; leave it out to check shapes only")
    return targets if isinstance(targets, str) else names
