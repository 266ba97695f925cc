"""How the adapters of other tools become adapters of PEFT without loss, by tool."""

from __future__ import annotations

TO_PEFT = {
    "mlx-lm": "convert it: transpose lora_a and lora_b into lora_A.weight and lora_B.weight under base_model.model., "
    "and write a LoraConfig with r=rank and lora_alpha=scale * rank (its scale is the whole scaling, not alpha)",
    "AdapterHub": "convert it: lora_A and lora_B of ...loras.NAME become lora_A.weight and lora_B.weight of the same "
    "layers under base_model.model., its r and alpha become r and lora_alpha; with use_gating or another "
    "composition_mode than 'add' merge it there instead (model.merge_adapter) and save the model",
    "diffusers": "nothing, if a pipeline of diffusers is to load it; for PEFT load it there (load_lora_weights) and "
    "save the LoraConfig in peft_config of the unet or transformer with get_peft_model_state_dict beside it",
    "kohya-ss": "nothing, if a pipeline of diffusers is to load it; for PEFT lora_down becomes lora_A and lora_up "
    "lora_B, the rows of lora_down are the rank, and each .alpha goes into alpha_pattern (where it is missing, "
    "alpha is the rank)",
    "torchtune": "convert it with tune_to_peft_adapter_weights and tune_to_peft_adapter_config of "
    "torchtune.models.convert_weights, which also reorder the rows of lora_B of q_proj and k_proj",
}
"""From mlx-lm 0.32 (``tuner/lora.py``: ``scale * x @ lora_a @ lora_b``), adapters 1.3 (``methods/lora.py``), diffusers'
``load_lora_weights``, and torchtune 0.6 (``models/convert_weights.py``)."""

TO_MLX = (
    "convert it: transpose lora_A.weight and lora_B.weight into lora_a and lora_b without base_model.model., save them "
    "as adapters.safetensors, and write adapter_config.json with fine_tune_type, num_layers, and lora_parameters of "
    "rank, scale={scale}, dropout and keys; or merge the adapter and convert the model with mlx_lm.convert"
)
"""To mlx-lm, from ``load_adapters`` of ``mlx_lm/tuner/utils.py``."""
