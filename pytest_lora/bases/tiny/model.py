"""The built-in base model: its architecture, and loading it quantized or plain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from pytest_lora.bases.tiny.text import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE
from pytest_lora.inspection.bitsandbytes_internals import keep_packing
from pytest_lora.inspection.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BitsAndBytesConfig, LlamaConfig, PreTrainedModel

Quantization = Literal["nf4", "fp4", "int8"]
ComputeDtype = Literal["float32", "float16", "bfloat16"]

WEIGHTS = Path(__file__).parent / "weights"


def tiny_config() -> LlamaConfig:
    """The architecture: Llama with 1,066,368 parameters in 5 layers, for bytes.

    Every linear size is a multiple of 64, the block size of 4-bit quantization in bitsandbytes. The query and
    the key/value projections differ in width (128 and 64), as in other models with grouped-query attention.
    The vocabulary of 320 holds 256 bytes, then padding (256), begin (257) and end (258) of sequence; the rest
    is unused. Input and output embeddings are separate.

    Returns:
        A new configuration, free to be changed.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def load_tiny(
    *,
    quantization: Quantization | None = "nf4",
    device: str | torch.device = "cpu",
    compute_dtype: ComputeDtype = "float32",
    double_quant: bool = False,
) -> PreTrainedModel:
    """Load the pretrained base from the installed package; nothing is fetched from anywhere.

    All parameters are frozen and the model is in evaluation mode. The global random state is left alone. On
    CPU, evaluation leaves 4-bit weights as they are: the repacking of bitsandbytes for inference is off.

    Args:
        quantization: how the linear layers but the output head are stored: ``"nf4"`` or ``"fp4"`` (4 bits,
            blocks of 64), ``"int8"`` (LLM.int8()), or None for plain weights.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        compute_dtype: dtype of matrix products, and of all weights that are not quantized.
        double_quant: whether the 4-bit block scales are themselves quantized; 4-bit only.

    Returns:
        A ``LlamaForCausalLM``. With 4 bits each quantized weight is a ``bitsandbytes.nn.Params4bit`` of
        uint8, two values a byte, with its ``quant_state``.

    Raises:
        ValueError: an argument is none of the above, the device is not there, or the installed bitsandbytes
            cannot quantize so on this device.
        FileNotFoundError: the installed package lacks the weights.
    """
    for name in ("config.json", "model.safetensors"):
        if not (WEIGHTS / name).is_file():
            raise FileNotFoundError(
                f"pytest-lora was installed without its base model: {WEIGHTS / name} is missing"
            )
    return _load(WEIGHTS, None, quantization, device, compute_dtype, double_quant)


def random_tiny(
    seed: int = 0,
    *,
    quantization: Quantization | None = "nf4",
    device: str | torch.device = "cpu",
    compute_dtype: ComputeDtype = "float32",
    double_quant: bool = False,
) -> PreTrainedModel:
    """The same model with random weights: what ``load_tiny`` was before pretraining.

    Args:
        seed: seed of the weights, 0 or greater; they do not depend on the device.
        quantization: as for ``load_tiny``, and so are all that follow.
        device: see there.
        compute_dtype: see there.
        double_quant: see there.

    Returns:
        A frozen ``LlamaForCausalLM`` in evaluation mode.

    Raises:
        ValueError: an argument is out of its range, as for ``load_tiny``.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, not {seed!r}")
    return _load(None, seed, quantization, device, compute_dtype, double_quant)


def _load(
    folder: Path | None,
    seed: int | None,
    quantization: Quantization | None,
    device: str | torch.device,
    compute_dtype: ComputeDtype,
    double_quant: bool,
) -> PreTrainedModel:
    _check_options(quantization, compute_dtype, double_quant)
    import torch
    from transformers import LlamaForCausalLM

    place = _device(device)
    dtype = cast("torch.dtype", getattr(torch, compute_dtype))
    cuda = [place.index] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), quiet_libraries():
        config = _quantization_config(quantization, dtype, double_quant)
        if place.type == "cpu":
            _require_on_cpu(quantization)
        model = LlamaForCausalLM.from_pretrained(
            folder,
            config=tiny_config(),
            state_dict=None if seed is None else _random_weights(seed),
            local_files_only=True,
            dtype=dtype,
            quantization_config=config,
            device_map={"": place},
        )
    keep_packing(model)
    model.requires_grad_(False)
    return model


def _check_options(quantization: object, compute_dtype: object, double_quant: object) -> None:
    if quantization is not None and quantization not in get_args(Quantization):
        raise ValueError(
            f"quantization must be one of {get_args(Quantization)} or None, not {quantization!r}"
        )
    if compute_dtype not in get_args(ComputeDtype):
        raise ValueError(f"compute_dtype must be one of {get_args(ComputeDtype)}, not {compute_dtype!r}")
    if not isinstance(double_quant, bool):
        raise ValueError(f"double_quant must be a bool, not {double_quant!r}")
    if double_quant and quantization not in ("nf4", "fp4"):
        raise ValueError(f"double_quant quantizes 4-bit scales, and quantization={quantization!r} has none")


def _device(device: str | torch.device) -> torch.device:
    """A CPU or CUDA device that is there, the latter with its index."""
    import torch

    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', not {device!r}") from error
    if place.type == "cpu":
        return torch.device("cpu")
    if place.type != "cuda":
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', not {device!r}")
    count = torch.cuda.device_count()
    if not count:
        raise ValueError(f"device={str(device)!r}, but torch sees no CUDA device")
    index = torch.cuda.current_device() if place.index is None else place.index
    if index >= count:
        raise ValueError(f"device={str(device)!r}, but torch sees {count} CUDA devices")
    return torch.device("cuda", index)


def _quantization_config(
    quantization: Quantization | None, dtype: torch.dtype, double_quant: bool
) -> BitsAndBytesConfig | None:
    from transformers import BitsAndBytesConfig

    if quantization is None:
        return None
    settings: dict[str, object] = {"load_in_8bit": True}
    if quantization != "int8":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_use_double_quant": double_quant,
        }
    untyped: Any = BitsAndBytesConfig
    return cast("BitsAndBytesConfig", untyped(**settings))


def _require_on_cpu(quantization: Quantization | None) -> None:
    """Raise ValueError where bitsandbytes fails at it on CPU, as 0.46 does at all but NF4."""
    import bitsandbytes
    import torch

    able = True
    if quantization == "fp4":
        try:
            bitsandbytes.functional.quantize_4bit(torch.zeros(64), blocksize=64, quant_type="fp4")
        except RuntimeError:
            able = False
    elif quantization == "int8":
        # 0.46 quantizes anew at every move from CPU to CPU, as loading makes: the scales are lost, silently.
        layers: Any = bitsandbytes.nn
        weight = layers.Int8Params(torch.ones(64, 64), requires_grad=False).to("cpu")
        able = bool(weight.to("cpu").SCB.max() == 1)
    if not able:
        version = bitsandbytes.__version__
        raise ValueError(f"quantization={quantization!r} needs a newer bitsandbytes on CPU than {version}")


def _random_weights(seed: int) -> dict[str, Tensor]:
    """Weights as transformers initializes them, drawn from the CPU generator, which the caller restores."""
    import torch
    from transformers import LlamaForCausalLM

    # torch.manual_seed would seed CUDA too, even if CUDA were first used only after this.
    torch.default_generator.manual_seed(seed)
    return dict(LlamaForCausalLM(tiny_config()).state_dict())
