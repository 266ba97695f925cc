"""Pretrain the built-in base on the sources of Python's standard library.

Run as ``python -m pytest_lora.bases.tiny.pretrain --out DIR --steps N`` (or ``--minutes M``). It writes
``config.json``, ``model.safetensors`` and ``training.json`` to ``DIR``. With ``--steps``, the result follows
from the processor and from what ``training.json`` records: the text, the recipe with its seed, the number of
threads and the versions of Python, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_lora.bases.tiny.model import tiny_config
from pytest_lora.bases.tiny.text import token_streams, windows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TIMED_STEPS = 10


@dataclass(frozen=True)
class Recipe:
    """How the base is trained. Lengths are in tokens (bytes), rates are AdamW's peak learning rate.

    The schedule has a linear warm-up and a cosine decay to a twentieth. The last part of training has windows
    of ``long_seq_len`` at as many tokens a step, so that all positions the model accepts are trained.
    """

    seed: int = 0
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    tokens_per_step: int = 1024
    seq_len: int = 128
    long_seq_len: int = 512
    long_from: float = 0.85

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at ``step`` of ``steps`` (counted from 0)."""
        warmup = min(self.warmup_steps, max(1, steps // 10))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def window(self, step: int, steps: int) -> int:
        """Window length in tokens at ``step`` of ``steps``."""
        return self.long_seq_len if step >= self.long_from * steps else self.seq_len


def next_token_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every next token in nats, for ids of shape ``(batch, length)``."""
    import torch

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)
    )


def validation_loss(model: PreTrainedModel, stream: Tensor, *, length: int = 256, count: int = 512) -> float:
    """Loss in nats per byte over at most ``count`` windows, spread evenly over the held-out stream.

    The end of a file counts as one more byte.
    """
    import torch

    count = min(count, len(stream) // length)
    starts = torch.linspace(0, len(stream) - length, count).long()
    total = 0.0
    with torch.inference_mode():
        for first in range(0, count, 16):
            part = starts[first : first + 16]
            total += next_token_loss(model, windows(stream, part, length)).item() * len(part)
    return total / count


class Training:
    """A fresh model, its optimizer and its source of windows."""

    def __init__(self, recipe: Recipe, stream: Tensor) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.stream = stream
        self.model = LlamaForCausalLM(tiny_config())
        self.generator = torch.Generator().manual_seed(recipe.seed)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            fused=True,
        )

    def step(self, step: int, steps: int) -> float:
        """Take step ``step`` (from 0) of ``steps`` and return its loss in nats per byte."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(step, steps)
        length = self.recipe.window(step, steps)
        count = self.recipe.tokens_per_step // length
        starts = torch.randint(len(self.stream) - length + 1, (count,), generator=self.generator)
        loss = next_token_loss(self.model, windows(self.stream, starts, length))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def steps_within(minutes: float, recipe: Recipe, stream: Tensor) -> int:
    """How many steps fit into ``minutes``, timed on a model that is then thrown away."""
    trial = Training(recipe, stream)
    for step in range(TIMED_STEPS):
        trial.step(step, 2 * TIMED_STEPS)
    before = time.perf_counter()
    for step in range(TIMED_STEPS):
        trial.step(step, 2 * TIMED_STEPS)
    return max(1, int(minutes * 60 * TIMED_STEPS / (time.perf_counter() - before)))


def run(
    recipe: Recipe, *, steps: int | None, minutes: float, validate_every: int, validation_windows: int
) -> tuple[PreTrainedModel, dict[str, object]]:
    """Train a fresh model and print its losses.

    Args:
        recipe: all settings but the length.
        steps: optimizer steps; if None, as many as fit into ``minutes``.
        minutes: time for training, used only where ``steps`` is None.
        validate_every: steps between validations on 64 windows of the length then in training.
        validation_windows: windows of 256 bytes for the final validation.

    Returns:
        The model, its weights rounded to float16, and what ``training.json`` will hold.
    """
    import torch
    import transformers

    train_stream, held_out, digest = token_streams()
    print(f"{len(train_stream):,} training bytes, {len(held_out):,} held-out bytes", flush=True)
    if steps is None:
        steps = steps_within(minutes, recipe, train_stream)
        print(f"{steps} steps fit into {minutes} minutes", flush=True)

    started = time.perf_counter()
    training = Training(recipe, train_stream)
    model = training.model
    losses: list[float] = []
    for step in range(steps):
        losses.append(training.step(step, steps))
        if len(losses) == validate_every:
            validation = validation_loss(model, held_out, length=recipe.window(step, steps), count=64)
            print(
                f"step {step + 1}/{steps}  training {sum(losses) / len(losses):.4f}"
                f"  validation {validation:.4f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            losses.clear()
    seconds = time.perf_counter() - started

    # What is stored is float16, so that is what the final figure must be about.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    nats = validation_loss(model, held_out, count=validation_windows)
    bits = nats / math.log(2)
    print(f"final validation {nats:.4f} nats/byte, {bits:.4f} bits/byte", flush=True)
    return model, {
        "validation_nats_per_byte": round(nats, 4),
        "validation_bits_per_byte": round(bits, 4),
        "steps": steps,
        "tokens": steps * recipe.tokens_per_step,
        "seed": recipe.seed,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "text": {
            "source": "Python standard library, *.py",
            "sha256": digest,
            "training_bytes": len(train_stream),
            "held_out_bytes": len(held_out),
        },
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def save(model: PreTrainedModel, record: dict[str, object], folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` (float16) and ``training.json`` to ``folder``."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pytest_lora.bases.tiny.pretrain",
        description="Pretrain the built-in base on the sources of Python's standard library.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for all that is written"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=_positive(int), help="optimizer steps; the run can then be repeated")
    length.add_argument("--minutes", type=_positive(float), default=0.0, help="as many steps as this allows")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and windows (default: 0)")
    parser.add_argument("--threads", type=_positive(int), default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--validate-every", type=_positive(int), default=250, metavar="STEPS", help="(default: 250)"
    )
    parser.add_argument(
        "--validation-windows",
        type=_positive(int),
        default=512,
        metavar="COUNT",
        help="windows of 256 bytes for the final validation (default: 512)",
    )
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive, not {text}")
        return value

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: in place of ``sys.argv[1:]``.

    Returns:
        The exit status, 0.

    Raises:
        SystemExit: the arguments cannot be parsed.
    """
    import torch

    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    model, record = run(
        Recipe(seed=options.seed),
        steps=options.steps,
        minutes=options.minutes,
        validate_every=options.validate_every,
        validation_windows=options.validation_windows,
    )
    save(model, record, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
