"""Rules on a model that carries LoRA adapters (codes 2xx)."""
