"""What a model does when it is saved and loaded, merged, padded or switched off; tried on copies of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import refusing, require_batch, require_expect
from pytest_lora.checks import report_on, reported
from pytest_lora.expect import Expect
from pytest_lora.findings import Report
from pytest_lora.rules import judge
from pytest_lora.rules.selection import codes
from pytest_lora.values import require_number

if TYPE_CHECKING:
    from torch import nn


@refusing
def check_reload(
    model: nn.Module,
    batch: Any,
    *,
    base: nn.Module | Callable[[], nn.Module] | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether saving the adapters and loading them on a fresh base gives the same output, bit for bit.

    A copy of the model is saved into a temporary folder with the model's own ``save_pretrained`` and loaded on
    the base; both run the batch in evaluation mode, with adapters unmerged and enabled. Task heads and token rows
    are part of it, buffers that change whenever the model runs are not. The model itself is neither run nor changed;
    memory for two copies of it is needed for a moment.

    Args:
        model: A ``PeftModel`` or a transformers model after ``add_adapter``, also inside DDP,
            ``torch.compile`` or a value head (which PEFT does not save, and which is not compared). Of several
            adapters after ``add_adapter`` the one that is active is saved and compared.
        batch: A mapping of arguments, a tuple of them, or one tensor, on the model's device.
        base: The base to load on, or a function that makes it; without, the base under the adapters, with
            weights that were trained there set to zero so that only the checkpoint can bring them back. It must be
            given after PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA, which rewrote the weights under the adapter.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report; codes LORA910 to LORA914.

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: The model cannot be copied or saved, does not take the batch, or gives random or no finite numbers
            for it; ``base`` is needed, cannot be made, carries adapters, or is given for a model that is merged; or a
            code does not exist.
        OSError: The temporary folder cannot be written.
    """
    from pytest_lora.inspection.behaviour.reload import reload_facts

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_batch("batch", batch)
    facts = reload_facts(model, batch, base=base)
    return report_on(f"reload of {type(model).__name__}", [facts], expect, select, ignore)


@refusing
def check_merge(
    model: nn.Module,
    batch: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether merging keeps the output, unmerging restores the weights, and unloading gives the base back.

    All is done on copies, with adapters enabled: the model itself is neither run nor changed. On a quantized base a
    merge rounds the weights again; how much that moves the output, and how that compares with what the adapter does,
    is an info, or a warning where it is more than half.

    Args:
        model: Anything with PEFT LoRA layers.
        batch: A mapping of arguments, a tuple of them, or one tensor, on the model's device.
        rtol: Deviation of the output that is allowed, relative to its largest value. By default that of the
            coarsest dtype of the adapted weights: 1e-4 for float32, 4e-3 for float16, 3e-2 for bfloat16.
        atol: Deviation allowed on top.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report; codes LORA915 to LORA919.

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: The model cannot be copied, does not take the batch, or gives random or no finite numbers for it;
            a tolerance is negative; or a code does not exist.
    """
    from pytest_lora.inspection.behaviour.merge import merge_facts

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_batch("batch", batch)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            require_number(name, value, least=0.0, finite=False)
    facts = merge_facts(model, batch, rtol=rtol, atol=atol)
    return report_on(f"merge of {type(model).__name__}", [facts], expect, select, ignore)


@refusing
def check_lora_laws(
    model: nn.Module,
    batch: Any,
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Hold the laws that every sound LoRA keeps, whatever it has learned.

    With B = 0 the adapter changes nothing (not under DoRA); disabled, the model is its base bit for bit; merged it
    gives what it gave unmerged, and unmerged again it has the same weights; saved and loaded it is bit for bit what
    it was; each layer's effect is linear in its scaling (not under DoRA); padding the rank with zeros changes
    nothing; and a second adapter that is not active changes nothing. Laws that do not apply to a model are left
    out: what is not a ``PeftModel`` gets no second adapter; a fused parameter and attention as a whole have no law of a
    single layer, a grouped convolution none of the padded rank. An adapter that PEFT refuses to merge is not merged,
    and where no second adapter can be added, none is compared: ``not_judged`` says so, and whether PEFT refused it or
    something else was raised. Done on copies: the model is left bit for bit as it was.

    Args:
        model: A model that carries LoRA layers.
        batch: What the model is called with: a mapping, a tuple or a tensor.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report; codes LORA930 to LORA934, and the errors of ``check_merge`` and ``check_reload``.

    Raises:
        TypeError: ``model`` carries no LoRA layers, or ``batch`` has another form.
        ValueError: The model cannot be copied, does not take the batch, or gives random or no finite numbers for it;
            or a code does not exist.
    """
    from pytest_lora.inspection.behaviour.laws import law_facts
    from pytest_lora.inspection.behaviour.merge import merge_facts
    from pytest_lora.inspection.behaviour.reload import reload_facts

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_batch("batch", batch)
    facts = law_facts(model, batch)
    merged = merge_facts(model, batch)
    trips: list[object] = [merged] if merged.refusal is None else []
    trips += [reload_facts(model, batch)] if facts.loads_as_it_is else []
    findings = [*judge([facts], expect), *(f for f in judge(trips, expect) if f.severity == "error")]
    left_out = [] if merged.refusal is None else [(f"PEFT refuses to merge: {merged.refusal}", "merging")]
    if facts.not_added is not None:
        left_out.append((facts.not_added, "a second adapter"))
    return reported(f"laws of {type(model).__name__}", findings, select, ignore, not_judged=tuple(left_out))
