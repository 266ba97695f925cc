"""Facts about the base model under an adapter; every stage shares them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseModule:
    """A module of the base that holds weights of its own and may be a LoRA target.

    Attributes:
        name: Full name in the base model, without what PEFT inserts.
        kind: Class name of the module (``"Linear"``, ``"Linear4bit"``, ``"Conv1D"``, ...).
        in_features: Logical input size, before any packing.
        out_features: Logical output size.
        quantization: ``"4bit"``, ``"8bit"``, another method's name, or None for plain weights.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    quantization: str | None

    @property
    def leaf(self) -> str:
        """Last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def is_linear(self) -> bool:
        """Whether PEFT's "all-linear" is about modules of this kind."""
        return "Linear" in self.kind or self.kind == "Conv1D"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers of the base are quantized by bitsandbytes, as found and as declared.

    Attributes:
        declared: ``"4bit"`` or ``"8bit"`` as the model or its config says, or None.
        skipped: Names that the declaration leaves unquantized.
        compute_dtypes: Compute dtypes found on 4-bit layers.
        unpacked: Quantized layers whose weight was never packed although it is not on the meta device.
    """

    declared: str | None
    skipped: tuple[str, ...]
    compute_dtypes: tuple[str, ...]
    unpacked: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TaskHead:
    """The module that a task class puts on top of the pretrained body (``score``, ``classifier``).

    ``fresh`` is True when its values are still those of the initialisation, False when they are not,
    and None when there are no values to look at.
    """

    name: str
    fresh: bool | None


HEADS_BY_TASK_TYPE = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Names that PEFT adds to ``modules_to_save`` by itself, of which a base has one or the other.

Source: ``PeftModelForSequenceClassification``, ``...TokenClassification`` and ``...QuestionAnswering``, which hold
these lists inside their constructors.
"""


def heads_named_by_peft(task_type: str | None, named: tuple[str, ...], absent: set[str]) -> frozenset[str]:
    """Those of ``modules_to_save`` that PEFT may have added.

    They are those of the task type, or of a task all of whose heads are named and not all absent: a
    ``PeftModelForSequenceClassification`` names them for an adapter without a task type too.
    """
    of_tasks = (
        heads
        for task, heads in HEADS_BY_TASK_TYPE.items()
        if task == task_type or (set(heads) <= set(named) and not set(heads) <= absent)
    )
    return frozenset(name for heads in of_tasks for name in heads)


TIED_BY_NAME = ("embed_tokens", "lm_head")
"""Names by which PEFT knows that ``ensure_weight_tying`` is meant.

Source: ``peft.utils.constants.EMBEDDING_LAYER_NAMES``, which ``BaseTuner._check_tied_modules`` looks for.
"""


def is_tied_by_name(module: str) -> bool:
    """Whether ``ensure_weight_tying`` holds for an embedding: PEFT saves what it ties under the input's name."""
    return module.rpartition(".")[2] in TIED_BY_NAME


@dataclass(frozen=True, slots=True)
class FusedParameter:
    """A parameter that stacks the weights of several experts.

    ``numbers`` is its logical size.
    """

    name: str
    numbers: int

    def stands_for(self, target: str) -> bool:
        """Whether it is called like a target, or is several of them in one (``gate_up_proj`` for ``up_proj``)."""
        last = self.name.rpartition(".")[2]
        return target == last or (target.endswith("_proj") and target[:-5] in last.split("_"))


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base model.

    Attributes:
        architecture: Class name (``"LlamaForCausalLM"``).
        task_type: The PEFT task type of what the class is made for, or None where there is none.
        modules: Modules that may be targets, in order.
        module_names: Every module of the base, in order.
        parameters: Logical number of parameters, tied ones once.
        layer_indices: Numbers of the transformer blocks.
        heads: Task heads.
        tied: Groups of modules that share one weight.
        input_embeddings: Name of the input embedding, or None.
        output_embeddings: Name of the output embedding (``lm_head``), or None.
        vocab_size: Rows of the input embedding, or None.
        has_biases: Whether any module has a bias.
        float_dtypes: Dtypes of the floating-point parameters that are not quantized.
        device_types: Types of the devices that hold parameters ("cpu", "cuda", "meta").
        quantization: None where nothing is or claims to be quantized.
        carries_adapter: Whether there are PEFT layers in it already.
        fused: Parameters that stack several weights (experts of a mixture), which no module name targets.
        takes_input_ids: Whether its forward takes ``input_ids``, which the classes that PEFT has for tasks hand on.
    """

    architecture: str
    task_type: str | None
    modules: tuple[BaseModule, ...]
    module_names: tuple[str, ...]
    parameters: int
    layer_indices: tuple[int, ...]
    heads: tuple[TaskHead, ...]
    tied: tuple[tuple[str, ...], ...]
    input_embeddings: str | None
    output_embeddings: str | None
    vocab_size: int | None
    has_biases: bool
    float_dtypes: tuple[str, ...]
    device_types: tuple[str, ...]
    quantization: Quantization | None
    carries_adapter: bool
    fused: tuple[FusedParameter, ...]
    takes_input_ids: bool = True

    @property
    def fitting_task_type(self) -> str | None:
        """The task type to give to a configuration: none where PEFT's class for it would not run."""
        return self.task_type if self.takes_input_ids else None

    @property
    def title(self) -> str:
        """The class name, with how the base is quantized: ``"LlamaForCausalLM in 4bit"``."""
        packed = next((m.quantization for m in self.modules if m.quantization), None)
        return f"{self.architecture} in {packed}" if packed else self.architecture

    def tied_to(self, module: str) -> tuple[str, ...]:
        """The other modules that share this module's weight."""
        return tuple(n for group in self.tied if module in group for n in group if n != module)
