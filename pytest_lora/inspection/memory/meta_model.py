"""A (Q)LoRA model on the meta device: real modules of transformers, bitsandbytes and PEFT without weights."""

from __future__ import annotations

import copy
import importlib
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_lora.facts.memory import Quantization, StepSetting
from pytest_lora.inspection.bitsandbytes_internals import pack_on_meta
from pytest_lora.inspection.limited.patterns import require_matchable
from pytest_lora.inspection.memory.cut_bases import KeptBases, cut_base
from pytest_lora.inspection.memory.fused_layers import fuse_layers
from pytest_lora.inspection.memory.fused_losses import fuse_loss
from pytest_lora.inspection.memory.layer_stacks import USUAL, Cut, Stack
from pytest_lora.inspection.memory.operations import times_played
from pytest_lora.inspection.memory.optimizers import OPTIMIZERS
from pytest_lora.inspection.memory.packed_weights import pack_weights
from pytest_lora.inspection.memory.parallel import before_adapters, distributed
from pytest_lora.inspection.memory.parallel.model import Rank, Trained, Weight, loaded_weights, units_of
from pytest_lora.inspection.memory.remedies import excluded_by_peft
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE
from pytest_lora.inspection.memory.trainers import set_up
from pytest_lora.inspection.peft_internals import freeze, store_adapter
from pytest_lora.inspection.rehearsal import without_values
from pytest_lora.inspection.skeleton import META, without_initial_values
from pytest_lora.inspection.transformers_internals import kept_whole, quantized_linears

if TYPE_CHECKING:
    from peft import LoraConfig

_LEFT_TO_CUT = "_lora_kasa_truncation_deferred"
"""Where KaSA notes base weights that it cuts at the first forward (``peft.tuners.lora.variants``)."""

_MONTECLORA = "_lora_monteclora_config"
"""Where a layer keeps the configurations of MonteCLoRA by adapter, whose samplers it makes at the first forward."""


@dataclass(frozen=True)
class MetaModel:
    """A model with adapters, ready to train but for its weights.

    Attributes:
        model: The model, in training mode.
        stacks: The repeated layers that were cut.
        unit_of: The unit of each parameter and buffer in them, by identity.
        weights: What is on the device once it is loaded, were it on one GPU.
        plan: On which of several GPUs each module lies, where these differ.
        rank: The part of one of several GPUs.
    """

    model: nn.Module
    stacks: list[Stack]
    unit_of: dict[int, int]
    weights: list[Weight]
    plan: dict[str, int] | None = None
    rank: Rank | None = None

    @property
    def transformer(self) -> nn.Module:
        """The base under the adapter."""
        return adapted_base(self.model)

    def copies_of(self, unit: int) -> int:
        """How many layers of the whole model a unit stands for."""
        return times_played(unit, {stack.number: stack.copies for stack in self.stacks})

    def held(self) -> list[Weight]:
        """What is on the device once it is loaded."""
        return self.weights if self.rank is None else self.rank.weights

    def trained(self) -> list[Trained]:
        """What the optimizer has on the device."""
        if self.rank is not None:
            return self.rank.trained
        return [
            Trained(tuple(p.shape), p.dtype, self.unit_of.get(id(p), OUTSIDE))
            for p in self.model.parameters()
            if p.requires_grad
        ]


def adapted_base(model: nn.Module) -> nn.Module:
    """The base under PEFT's wrapper."""
    wrapper: Any = model
    inner: nn.Module = wrapper.get_base_model()
    return inner


def build(
    base: Any,
    config: LoraConfig,
    setting: StepSetting,
    *,
    cut: Cut = USUAL,
    kept: KeptBases | None = None,
) -> MetaModel:
    """Build the model of a setting on the meta device.

    Args:
        base: A live model, a ``PretrainedConfig``, or a path; see ``resolve_base``.
        config: The adapter; it is not changed.
        setting: Quantization, dtype and checkpointing.
        cut: How inner layers that are like their neighbours are left out.
        kept: Bases that were built of the same ``base`` before.

    Raises:
        TypeError: ``base`` is nothing that a base can be made of.
        ValueError: The base cannot be built, carries an adapter, or PEFT refuses the configuration.
    """
    bare = cut_base(base, config, setting, cut, kept)
    model, stacks = bare.model, bare.stacks
    if setting.quantization is not None:
        _quantize(model, setting.quantization, setting)
    before_adapters(model, setting)
    _prepare(model, setting)
    adapted = _with_adapter(model, config, setting).train()
    store_adapter(adapted, getattr(torch, setting.adapter_dtype), magnitudes=not setting.by_trl)
    _upcast(adapted, setting.upcast)
    freeze(adapted, (*setting.frozen, *OPTIMIZERS[setting.optimizer].frozen))
    if setting.loss != "full":
        fuse_loss(adapted_base(adapted), setting)
    if setting.kernels is not None:
        fuse_layers(adapted, setting.kernels)
    if setting.by_trl:
        set_up(adapted, adapted_base(adapted), setting)
    unit_of = units_of(stacks)
    built = MetaModel(adapted, stacks, unit_of, loaded_weights(adapted, unit_of), bare.plan)
    return built if setting.parallel is None else distributed(built, setting, setting.parallel)


def _quantize(model: nn.Module, quantization: Quantization, setting: StepSetting) -> None:
    """Replace linear layers as transformers does, and give them quantized weights without values."""
    if not quantization.by_bitsandbytes:
        pack_weights(model, [*kept_whole(model, None), *quantization.skip_modules], setting)
        return
    in_4_bits = quantization.method != "int8"
    for module in quantized_linears(model, _bitsandbytes_config(quantization)):
        pack_on_meta(module, getattr(torch, setting.dtype))
    marked: Any = model
    marked.is_quantized = True
    marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = in_4_bits, not in_4_bits


def _bitsandbytes_config(quantization: Quantization) -> Any:
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    if quantization.method == "int8":
        return make(load_in_8bit=True, llm_int8_skip_modules=list(quantization.skip_modules) or None)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.method,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, quantization.storage),
        llm_int8_skip_modules=list(quantization.skip_modules) or None,
    )


def _prepare(model: nn.Module, setting: StepSetting) -> None:
    """Freeze the base and switch checkpointing on, as PEFT's helper or the Trainer do."""
    transformer: Any = model
    reentrant = setting.gradient_checkpointing == "reentrant"
    checkpointing = bool(setting.gradient_checkpointing)
    arguments = {"use_reentrant": reentrant}
    if setting.prepare_for_kbit:
        import peft

        prepare: Any = peft.prepare_model_for_kbit_training
        prepare(
            transformer, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=arguments
        )
    elif checkpointing:
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        if reentrant or setting.by_trl:
            transformer.enable_input_require_grads()
    if checkpointing or not setting.use_cache:
        transformer.config.use_cache = False


def _upcast(model: nn.Module, names: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied head has another's
        if parameter.is_floating_point() and any(part in name for part in names):
            parameter.data = parameter.data.to(torch.float32)


def _with_adapter(model: nn.Module, config: LoraConfig, setting: StepSetting) -> nn.Module:
    from peft import get_peft_model

    config = copy.deepcopy(config)
    config.inference_mode = False
    without_values(config)
    config.alora_invocation_tokens = None  # PEFT would look for them in tokens that have no values here
    transformer: Any = model
    require_matchable(config, dict(model.named_modules()))
    try:
        # An embedding's factors are drawn before they go to the meta device.
        with warnings.catch_warnings(), META, without_initial_values(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            adapted: nn.Module = get_peft_model(
                transformer,
                config,
                low_cpu_mem_usage=True,
                autocast_adapter_dtype=setting.adapter_dtype == "float32",
            )
    except Exception as error:
        raise ValueError(
            f"config: PEFT refuses it on this base: {error}{_hint(error, setting)}{excluded_by_peft(error)}"
        ) from error
    with torch.random.fork_rng(devices=[]):
        finish(adapted)
    return adapted


def _hint(error: Exception, setting: StepSetting) -> str:
    """What to write where a layer that is to be trained in full was quantized: a new head, for one."""
    if setting.quantization is None or "floating point dtype can require gradients" not in str(error):
        return ""
    return (
        "; a layer of modules_to_save (a classifier is one by its task_type) is quantized: leave it whole with "
        "BitsAndBytesConfig(..., llm_int8_skip_modules=[its name])"
    )


def finish(model: nn.Module) -> None:
    """Do what PEFT puts off until a layer has values: take base weights as cut, and give layers their samplers."""
    for module in model.modules():
        getattr(module, _LEFT_TO_CUT, set()).clear()
        for adapter, config in getattr(module, _MONTECLORA, {}).items():
            samplers: Any = module.lora_monteclora_sampler
            if adapter not in samplers:
                samplers[adapter] = _sampler(module, adapter, config)


def _sampler(layer: Any, adapter: str, config: Any) -> nn.Module:
    """A sampler with all that it holds: noise is drawn for ``buffer_size`` steps at once, and kept.

    One of a single step is made with values, as drawing asks for them; the whole buffer then stands on the meta device.
    The noise has the dtype of the base, where that is not packed; PEFT casts no more than the parameters afterwards.
    """
    variant: Any = importlib.import_module("peft.tuners.lora.monteclora")
    factor = layer.lora_A[adapter].weight
    base = layer.get_base_layer().weight.dtype
    made: Any = variant.MontecloraSampler(
        layer.in_features,
        factor.shape[0],
        **{**asdict(config), "buffer_size": 1},
        device="cpu",
        dtype=base if base.is_floating_point else torch.float32,
    )
    for parameter in made.parameters():
        parameter.data = parameter.data.to(factor.dtype)
    made.to("meta")
    drawn = {}
    for name, tensor in made.sampler.buffer[0].items():
        held = torch.empty(config.buffer_size, *tensor.shape, dtype=tensor.dtype, device="meta")
        made.register_buffer(f"drawn_{name}", held, persistent=False)
        drawn[name] = held[0]
    made.sampler.get = lambda: drawn
    sampler: nn.Module = made
    return sampler
