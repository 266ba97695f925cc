"""The built-in base: a small byte-level causal language model, pretrained, its weights in the package."""

from pytest_lora.bases.tiny.model import ComputeDtype, Quantization, load_tiny, random_tiny, tiny_config
from pytest_lora.bases.tiny.text import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    decode,
    encode,
    sample_texts,
    text_batch,
)

__all__ = [
    "BOS_ID",
    "EOS_ID",
    "PAD_ID",
    "VOCAB_SIZE",
    "ComputeDtype",
    "Quantization",
    "decode",
    "encode",
    "load_tiny",
    "random_tiny",
    "sample_texts",
    "text_batch",
    "tiny_config",
]
