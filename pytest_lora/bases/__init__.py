"""Bases: the small pretrained one in the wheel, and models in a local folder, quantized to 4 bits like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel


def load_in_4bit(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load a transformers model from a folder, its linear layers quantized to nf4 unless they are quantized.

    All parameters are frozen and the model is in evaluation mode. Nothing is downloaded, no code of the folder
    is run, and the global random state of torch is left alone.

    Args:
        folder: Has ``config.json`` and the weights. The class is the one that the config names, else
            ``AutoModelForCausalLM``.
        device: Where the model goes.

    Raises:
        OSError: The weights are missing.
        ValueError: transformers does not know the architecture.
    """
    import torch
    import transformers

    from pytest_lora.inspection.bitsandbytes_internals import keep_packing

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    named = (config.architectures or [""])[0]
    architecture: Any = getattr(transformers, named, transformers.AutoModelForCausalLM)
    quantization: Any = None
    if getattr(config, "quantization_config", None) is None:
        settings: Any = transformers.BitsAndBytesConfig
        quantization = settings(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model: PreTrainedModel = architecture.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            quantization_config=quantization,
            device_map={"": device},
        )
    keep_packing(model)
    model.requires_grad_(False)
    return model
