"""Hypothesis strategies for LoRA set-ups; needs the extra ``pytest-lora[strategies]``.

Importing this registers the settings profiles ``lora-ci`` and ``lora-dev``; it chooses none.
"""

from pytest_lora.strategies.configs import lora_configs
from pytest_lora.strategies.faults import misconfigured_lora_configs
from pytest_lora.strategies.folders import AdapterFolder, adapter_folders, build_adapter_folder
from pytest_lora.strategies.models import build_lora_model, lora_models, register_profiles
from pytest_lora.strategies.shapes import TrainingShape, training_shapes

__all__ = [
    "AdapterFolder",
    "TrainingShape",
    "adapter_folders",
    "build_adapter_folder",
    "build_lora_model",
    "lora_configs",
    "lora_models",
    "misconfigured_lora_configs",
    "training_shapes",
]

register_profiles()
