"""The built-in base: text and ids, loading, quantization, what pretraining gave it, its training script."""

from __future__ import annotations

import json
import math
import random
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import bitsandbytes
import numpy
import pytest
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import pytest_lora.bases.tiny
from pytest_lora.bases.tiny import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    decode,
    encode,
    load_tiny,
    pretrain,
    random_tiny,
    sample_texts,
    text_batch,
    tiny_config,
)
from pytest_lora.bases.tiny.pretrain import Recipe
from tests.forked import outcome

# Library-like code that is in no version of Python's standard library.
UNSEEN_PYTHON = '''
class TideTable:
    """A table of high and low tides for one harbour.

    The table is read from *path*, and entries that are not valid raise
    a ValueError.
    """

    def __init__(self, path, encoding=None):
        self.path = path
        self.entries = []
        with open(path, encoding=encoding) as file:
            for line in file:
                if not line.strip():
                    continue
                name, value = line.split(":", 1)
                self.entries.append((name, int(value)))

    def __len__(self):
        return len(self.entries)

    def get(self, name, default=None):
        """Return the value for *name*, or *default* if there is none."""
        for key, value in self.entries:
            if key == name:
                return value
        return default
'''

ONLY_NF4_ON_CPU = Version(bitsandbytes.__version__) < Version("0.47")
newer_bitsandbytes = pytest.mark.skipif(ONLY_NF4_ON_CPU, reason="this bitsandbytes has only NF4 on CPU")

WEIGHTS = Path(pytest_lora.bases.tiny.__file__).parent / "weights"


def unseen_loss(model: torch.nn.Module) -> float:
    """Nats per byte on the unseen code, which is cut into two windows."""
    ids = encode(UNSEEN_PYTHON, bos=False)
    half = len(ids) // 2
    batch = torch.tensor([[BOS_ID, *ids[:half]], [BOS_ID, *ids[half : 2 * half]]])
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)


def linear_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of all linear layers in the decoder, which are those that are quantized."""
    return {name: p for name, p in model.named_parameters() if "_proj." in name}


@pytest.fixture(scope="module")
def nf4() -> torch.nn.Module:
    return load_tiny()


class TestText:
    @pytest.mark.parametrize("text", ["", "x = 1\n", "tidé 潮 🌊", "\x00\t\r\n"])
    def test_round_trip(self, text: str) -> None:
        assert decode(encode(text)) == text
        assert decode(encode(text, bos=False)) == text

    def test_ids_are_bytes(self) -> None:
        assert encode("aé") == [BOS_ID, 97, 195, 169]
        assert encode("aé", bos=False) == [97, 195, 169]

    def test_special_ids_carry_no_text(self) -> None:
        assert decode([BOS_ID, 97, EOS_ID, PAD_ID, VOCAB_SIZE - 1]) == "a"

    def test_decode_accepts_a_tensor(self) -> None:
        assert decode(torch.tensor(encode("tide"))) == "tide"

    def test_broken_utf8_is_replaced(self) -> None:
        assert decode([195, 97]) == "\ufffda"

    @pytest.mark.parametrize("bad", [-1, VOCAB_SIZE])
    def test_id_outside_vocabulary(self, bad: int) -> None:
        with pytest.raises(ValueError, match="ids"):
            decode([bad])

    def test_encode_wants_text(self) -> None:
        with pytest.raises(TypeError, match="text"):
            encode(b"bytes")


class TestTextBatch:
    def test_shapes_and_labels(self) -> None:
        batch = text_batch(batch_size=8, seq_len=72)
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        for tensor in (ids, mask, labels):
            assert tensor.shape == (8, 72)
            assert tensor.dtype == torch.int64
        assert (ids[:, 0] == BOS_ID).all()
        assert ((ids == EOS_ID).sum(1) == 1).all()
        padded = ids == PAD_ID
        assert padded.any()
        assert torch.equal(mask, (~padded).long())
        assert (labels[padded] == -100).all()
        assert torch.equal(labels[~padded], ids[~padded])

    def test_rows_are_the_sample_texts(self) -> None:
        ids = text_batch(batch_size=4, seq_len=128)["input_ids"]
        assert [decode(row) for row in ids] == sample_texts(4)

    def test_own_texts_repeat_and_are_cut(self) -> None:
        ids = text_batch(["abcdef", "xy"], batch_size=3, seq_len=4)["input_ids"]
        assert ids.tolist() == [[BOS_ID, 97, 98, 99], [BOS_ID, 120, 121, EOS_ID], [BOS_ID, 97, 98, 99]]

    def test_always_the_same(self) -> None:
        assert sample_texts(1) == ['{"at":"05:41","station":"Ullock","tide_cm":348,"wind":"N 3"}']
        assert sample_texts(40)[10:] == sample_texts(30, start=10)
        first, second = text_batch(), text_batch()
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"batch_size": 0}, "batch_size"),
            ({"batch_size": 2.0}, "batch_size"),
            ({"seq_len": 1}, "seq_len"),
            ({"seq_len": True}, "seq_len"),
            ({"texts": []}, "texts"),
            ({"device": "teapot"}, "device"),
        ],
    )
    def test_bad_arguments(self, arguments: dict, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            text_batch(**arguments)

    @pytest.mark.parametrize("texts", ["one string", [b"bytes"]])
    def test_texts_of_wrong_type(self, texts: object) -> None:
        with pytest.raises(TypeError, match="texts"):
            text_batch(texts)

    @pytest.mark.parametrize(("count", "start", "named"), [(-1, 0, "count"), (1, -1, "start")])
    def test_bad_sample_range(self, count: int, start: int, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            sample_texts(count, start=start)


class TestArchitecture:
    def test_linear_sizes_fit_blocks(self) -> None:
        sizes = [p.shape for p in linear_weights(random_tiny(quantization=None)).values()]
        assert len(sizes) == 5 * 7
        assert all(size % 64 == 0 for shape in sizes for size in shape)

    def test_about_a_million_parameters(self) -> None:
        assert sum(p.numel() for p in random_tiny(quantization=None).parameters()) == 1_066_368

    def test_config_is_fresh(self) -> None:
        tiny_config().hidden_size = 1
        assert tiny_config().hidden_size == 128


class TestLoading:
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_four_bits_are_packed(self, double_quant: bool) -> None:
        plain = linear_weights(load_tiny(quantization=None))
        packed = linear_weights(load_tiny(double_quant=double_quant))
        assert packed.keys() == plain.keys()
        for name, weight in packed.items():
            assert isinstance(weight, Params4bit)
            assert weight.dtype == torch.uint8
            assert weight.numel() * 2 == plain[name].numel()
            assert weight.quant_state is not None
            assert weight.quant_state.quant_type == "nf4"
            assert weight.quant_state.blocksize == 64
            assert weight.quant_state.nested is double_quant
            assert weight.quant_state.shape == plain[name].shape

    @newer_bitsandbytes
    def test_eight_bits(self) -> None:
        for weight in linear_weights(load_tiny(quantization="int8")).values():
            assert isinstance(weight, Int8Params)
            assert weight.dtype == torch.int8

    @newer_bitsandbytes
    def test_fp4(self) -> None:
        for weight in linear_weights(load_tiny(quantization="fp4")).values():
            assert isinstance(weight, Params4bit)
            assert weight.quant_state.quant_type == "fp4"

    @pytest.mark.skipif(not ONLY_NF4_ON_CPU, reason="bitsandbytes does all of it on CPU since")
    @pytest.mark.parametrize("quantization", ["fp4", "int8"])
    def test_refuses_what_old_bitsandbytes_gets_wrong(self, quantization: str) -> None:
        """There fp4 fails deep inside, and int8 loses its scales with no error at all."""
        with pytest.raises(ValueError, match=f"quantization='{quantization}' .* CPU"):
            load_tiny(quantization=quantization)

    @pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=newer_bitsandbytes), None])
    @pytest.mark.parametrize("build", [load_tiny, random_tiny])
    def test_frozen_on_cpu_in_evaluation_mode(self, build: object, quantization: str | None) -> None:
        model = build(quantization=quantization)
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert not any(hasattr(module, "_hf_hook") for module in model.modules())

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_compute_dtype(self, dtype: str) -> None:
        model = load_tiny(compute_dtype=dtype)
        assert model.lm_head.weight.dtype == getattr(torch, dtype)
        assert model.model.norm.weight.dtype == getattr(torch, dtype)
        assert model.model.layers[0].self_attn.q_proj.compute_dtype == getattr(torch, dtype)

    def test_stored_weights_are_what_is_loaded(self) -> None:
        model = load_tiny(quantization=None)
        with safe_open(WEIGHTS / "model.safetensors", "pt") as stored:
            assert set(stored.keys()) == set(model.state_dict())
            for name, weight in model.state_dict().items():
                assert torch.equal(weight, stored.get_tensor(name).float())

    def test_loads_by_path_too(self) -> None:
        """PEFT notes the base's path in a saved adapter, so the folder must be one like any other."""
        ours = load_tiny(quantization=None)
        model = AutoModelForCausalLM.from_pretrained(ours.name_or_path, dtype=torch.float32)
        assert unseen_loss(model) == unseen_loss(ours)

    def test_evaluation_changes_neither_weights_nor_gradients(self) -> None:
        """bitsandbytes may repack 4-bit weights in evaluation, and then gradients are wrong."""

        def gradients(evaluate_first: bool) -> dict[str, torch.Tensor]:
            base = load_tiny()
            torch.manual_seed(0)
            config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            adapted = get_peft_model(base, config)
            before = {name: weight.clone() for name, weight in linear_weights(base).items()}
            if evaluate_first:
                with torch.no_grad():
                    adapted.eval()(**text_batch())
            adapted.train()(**text_batch()).loss.backward()
            for name, weight in linear_weights(base).items():
                assert torch.equal(weight, before[name])
            return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}

        fresh, evaluated = gradients(False), gradients(True)
        assert len(fresh) == 5 * 7 * 2
        for name, gradient in fresh.items():
            assert torch.equal(gradient, evaluated[name])

    def test_models_are_independent(self) -> None:
        first, second = load_tiny(), load_tiny()
        first.lm_head.weight.zero_()
        assert second.lm_head.weight.any()

    def test_random_weights_follow_the_seed(self) -> None:
        first, again, other = (random_tiny(seed).state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(first[name], again[name]) for name in first)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(first[name], other[name])

    @pytest.mark.parametrize("build", [load_tiny, random_tiny])
    def test_random_states_are_left_alone(self, build: object) -> None:
        states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        build()
        assert states == (
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )

    @pytest.mark.lora_slow
    def test_silent_even_in_a_fresh_process(self) -> None:
        code = (
            "import warnings; warnings.simplefilter('error')\n"
            "from pytest_lora.bases.tiny import load_tiny, random_tiny\n"
            "load_tiny(); random_tiny(); load_tiny(quantization=None)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_settings_of_libraries_are_put_back(self) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.enable_progress_bar()
        verbosity = transformers_logging.get_verbosity()
        filters = list(warnings.filters)
        load_tiny()
        assert transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.get_verbosity() == verbosity
        assert warnings.filters == filters

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"quantization": "nf5"}, "quantization"),
            ({"quantization": ["nf4"]}, "quantization"),
            ({"device": "teapot"}, "device"),
            ({"device": "meta"}, "device"),
            ({"device": "cuda:99"}, "device"),
            ({"compute_dtype": "float8"}, "compute_dtype"),
            ({"compute_dtype": torch.float32}, "compute_dtype"),
            ({"double_quant": 1}, "double_quant"),
            ({"double_quant": True, "quantization": "int8"}, "double_quant"),
            ({"double_quant": True, "quantization": None}, "double_quant"),
        ],
    )
    @pytest.mark.parametrize("build", [load_tiny, random_tiny])
    def test_bad_arguments(self, build: object, arguments: dict, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            build(**arguments)

    @pytest.mark.parametrize("seed", [-1, 1.5, True])
    def test_bad_seed(self, seed: object) -> None:
        with pytest.raises(ValueError, match="seed"):
            random_tiny(seed)

    def test_import_is_light(self) -> None:
        code = (
            "import sys, pytest_lora.bases.tiny\n"
            "print(sorted({'torch', 'transformers', 'bitsandbytes', 'peft', 'numpy'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestPretrained:
    def test_knows_unseen_python(self, nf4: torch.nn.Module) -> None:
        trained, untrained = unseen_loss(nf4), unseen_loss(random_tiny())
        assert untrained == pytest.approx(math.log(VOCAB_SIZE), abs=0.2)
        assert trained < 1.2
        assert trained < untrained / 4

    @pytest.mark.parametrize(
        "quantization",
        [
            "nf4",
            pytest.param("fp4", marks=newer_bitsandbytes),
            pytest.param("int8", marks=newer_bitsandbytes),
        ],
    )
    def test_quantization_costs_little(self, quantization: str) -> None:
        plain = unseen_loss(load_tiny(quantization=None))
        assert unseen_loss(load_tiny(quantization=quantization)) == pytest.approx(plain, abs=0.1)

    def test_all_positions_are_trained(self) -> None:
        """Loss does not rise towards the last position that the model accepts."""
        model = load_tiny(quantization=None)
        ids = encode(UNSEEN_PYTHON)[: model.config.max_position_embeddings]
        assert len(ids) == 512
        batch = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=batch).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="none")
        assert losses[256:].mean() < losses[:256].mean() + 0.3

    def test_lora_learns_in_twenty_steps(self) -> None:
        torch.manual_seed(0)
        adapted = get_peft_model(load_tiny(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
        batch = text_batch()
        losses = []
        for _ in range(20):
            loss = adapted(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2

    def test_weights_fit_into_the_wheel(self) -> None:
        assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 4_000_000
        assert {path.name for path in WEIGHTS.iterdir()} == {
            "NOTICE.txt",
            "config.json",
            "model.safetensors",
            "training.json",
        }

    def test_record_agrees_with_the_weights(self) -> None:
        record = json.loads((WEIGHTS / "training.json").read_text(encoding="utf-8"))
        assert record["parameters"] == 1_066_368
        nats, bits = record["validation_nats_per_byte"], record["validation_bits_per_byte"]
        assert bits == pytest.approx(nats / math.log(2), abs=1e-3)
        assert unseen_loss(load_tiny(quantization=None)) == pytest.approx(nats, abs=0.5)


@pytest.mark.lora_slow
def test_pretraining_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line in a process of its own, then the same recipe in this one, which makes the same weights."""
    settings = ["--threads", "1", "--validate-every", "8", "--validation-windows", "8"]
    monkeypatch.setattr(sys, "argv", ["", "--steps", "8", "--out", str(tmp_path / "first"), *settings])
    done = outcome(lambda: runpy.run_module("pytest_lora.bases.tiny.pretrain", run_name="__main__") and 0)
    assert done.returncode == 0, done.stderr
    output = done.stdout
    with torch.random.fork_rng():
        made = pretrain.run(Recipe(), steps=8, minutes=0.0, validate_every=8, validation_windows=8)
    pretrain.save(*made, tmp_path / "second")
    assert "step 8/8" in output
    assert "final validation" in output

    record = json.loads((tmp_path / "first" / "training.json").read_text(encoding="utf-8"))
    assert record["steps"] == 8
    assert record["tokens"] == 8 * 1024
    assert record["validation_nats_per_byte"] < 5.0 < math.log(VOCAB_SIZE)
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert stored[0] == stored[1]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    assert model.config.vocab_size == VOCAB_SIZE
    assert unseen_loss(model) < 5.0


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--minutes", "nan"], [], ["--steps", "5", "--minutes", "1"]]
)
def test_pretraining_script_refuses(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pytest_lora.bases.tiny.pretrain import main

    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), *arguments])
    assert "error" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
