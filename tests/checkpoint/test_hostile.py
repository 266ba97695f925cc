"""Folders that nobody vouches for: nothing in them runs, each oddity is a finding, time and memory are bounded."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from pytest_lora import Expect, Finding, Report, check_checkpoint
from pytest_lora.bases.examples import folders
from pytest_lora.inspection.checkpoint import values
from pytest_lora.inspection.checkpoint.fit import _class_of_the_adapter
from pytest_lora.inspection.checkpoint.folder import Folder, UnreadableError
from pytest_lora.inspection.checkpoint.header import read_header
from tests.checkpoint.damage import ODD_VALUES, PICKLE, damaged
from tests.namespace import Namespace

pytestmark = pytest.mark.lora_slow

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def path(names: Namespace) -> Path:
    return names.adapter()


def finding(path: Path, code: str) -> Finding:
    (found,) = [f for f in check_checkpoint(path).findings if f.code == code]
    return found


def split(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    content = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: bytes, body: bytes, length: int | None = None) -> Path:
    claimed = len(header) if length is None else length
    (path / WEIGHTS).write_bytes(claimed.to_bytes(8, "little") + header + body)
    return path


def with_header(path: Path, **changes: object) -> Path:
    """Change what the header says of its first tensor."""
    header, body = split(path)
    name = next(name for name in header if name != "__metadata__")
    header[name] = {**header[name], **changes}
    return join(path, json.dumps(header).encode(), body)


def test_a_header_of_exabytes(path: Path) -> None:
    join(path, b"{}", b"", length=2**63)
    found = finding(path, "LORA401")
    assert found.observed == "its header claims 9,223,372,036,854,775,808 bytes, but the file has 10"
    assert found.fix == "copy or download the file again, or save the adapter again"


def test_a_header_of_many_megabytes_in_a_hole(path: Path) -> None:
    with open(path / WEIGHTS, "wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    assert finding(path, "LORA401").observed == (
        "its header is 1,073,741,824 bytes long, and at most 12,582,912 are read"
    )


def test_a_file_that_was_cut_off(path: Path) -> None:
    size = (path / WEIGHTS).stat().st_size
    folders.cut(path, WEIGHTS, by=7)
    assert finding(path, "LORA401").observed == (
        f"it is cut off: its tensors end at byte {size:,}, the file at {size - 7:,}"
    )


@pytest.mark.parametrize(
    ("changes", "observed"),
    [
        (
            {"shape": [8, 2**40]},
            "takes 2,048 bytes, but its shape and dtype need 35,184,372,088,832",
        ),
        ({"shape": [2**62] * 60}, "claims more numbers than any file can hold"),
        ({"shape": [-8, -64]}, "are no sizes"),
        ({"shape": [8.0, 64]}, "are no sizes"),
        ({"shape": [10**400, 64]}, "are no sizes"),
        ({"dtype": "Q4"}, "has the unknown dtype 'Q4'"),
        ({"dtype": {}}, "has the unknown dtype"),
        ({"data_offsets": [2**64, 0]}, "are no sizes"),
        ({"data_offsets": [4, 2052]}, "belong to no tensor"),
    ],
)
def test_a_header_that_lies(path: Path, changes: dict[str, object], observed: str) -> None:
    assert observed in finding(with_header(path, **changes), "LORA401").observed


def test_tensors_that_overlap(path: Path) -> None:
    header, body = split(path)
    tensors = [header[name] for name in header if name != "__metadata__"]
    tensors[1]["data_offsets"] = tensors[0]["data_offsets"]
    join(path, json.dumps(header).encode(), body)
    assert finding(path, "LORA401").observed.endswith("overlaps the tensor before it")


def test_a_name_that_stands_there_twice(path: Path) -> None:
    header, body = split(path)
    raw = json.dumps(header).encode().rstrip()
    join(path, raw[:-1] + b"," + raw[1:], body)
    assert "twice" in finding(path, "LORA401").observed
    text = (path / CONFIG).read_text().rstrip()
    (path / CONFIG).write_text(text[:-1] + ', "r": 16}')
    assert finding(path, "LORA412").observed == "it has the name 'r' twice"


@pytest.mark.parametrize(
    ("content", "observed"),
    [
        (b"[" * 200_000, "it is nested too deeply to be read"),
        (b'{"a":' * 200_000, "it is nested too deeply to be read"),
        (b"[1]", "it holds a list instead of an object"),
        (b"null", "it holds null instead of an object"),
        (b"", "it is empty"),
        (b"\xff\xfe{\x00", "it is not UTF-8: invalid start byte at byte 0"),
        (b" " * 3_000_000, "it is 3,000,000 bytes long, and at most 2,097,152 are read"),
        (b'{"a":[' + b"0," * 1_020_000 + b"0]}", "it holds more than 1,000,000 values"),
        (b'{"r":' + b"9" * 5000 + b"}", "it is no JSON"),
    ],
    ids=range(9),
)
def test_a_configuration_that_is_none(path: Path, content: bytes, observed: str) -> None:
    (path / CONFIG).write_bytes(content)
    assert finding(path, "LORA412").observed.startswith(observed)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("place", ["/etc/passwd", "/dev/zero", "../elsewhere", "loop"])
def test_links_out_of_the_folder_are_not_followed(path: Path, name: str, place: str) -> None:
    (path.parent / "elsewhere").write_text("{}")
    (path / name).unlink()
    (path / name).symlink_to(name if place == "loop" else place)
    found = finding(path, "LORA412" if name == CONFIG else "LORA401")
    if place != "loop":
        assert found.observed == "it is a link that leads out of the folder; it was not followed"


def test_links_within_the_folder_and_into_a_hub_cache_are(path: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--adapter" / "blobs"
    snapshot = tmp_path / "models--org--adapter" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate((CONFIG, WEIGHTS)):
        (path / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    assert check_checkpoint(snapshot).findings == ()
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../../elsewhere")
    assert not check_checkpoint(snapshot).ok


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_folders_and_pipes_in_the_place_of_files(path: Path, name: str) -> None:
    code = "LORA412" if name == CONFIG else "LORA401"
    (path / name).unlink()
    (path / name).mkdir()
    assert finding(path, code).observed == "it is a folder"
    (path / name).rmdir()
    os.mkfifo(path / name)
    assert finding(path, code).observed == "it is a pipe or device"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files_that_may_not_be_read(path: Path, name: str) -> None:
    (path / name).chmod(0)
    found = finding(path, "LORA412" if name == CONFIG else "LORA401")
    assert found.observed == "it cannot be read: permission denied"


def test_files_that_cannot_be_read_are_findings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert finding(path, "LORA401").observed == "it cannot be read: permission denied"


def test_a_file_that_changes_while_it_is_read(path: Path) -> None:
    folder = Folder(path)
    with pytest.raises(UnreadableError, match="it changed while it was read"), folder.opened(WEIGHTS):
        (path / WEIGHTS).write_bytes(b"short")


def test_a_file_that_shrinks_all_the_time_does_no_harm(path: Path) -> None:
    """Under a memory map this ends the process with SIGBUS."""
    content = (path / WEIGHTS).read_bytes()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            (path / WEIGHTS).write_bytes(b"")
            (path / WEIGHTS).write_bytes(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            check_checkpoint(path)
    finally:
        stop.set()
        writer.join()


ENDLESS = ("(a+)+$", "(.|.)*x", ".*" * 40 + "x", r"(\w+\.)*!", "x{4294967295}", "(" * 500 + ")" * 500)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        *(("target_modules", pattern) for pattern in ENDLESS),
        *((field, ENDLESS[1]) for field in ("exclude_modules", "rank_pattern", "layers_pattern")),
    ],
)
def test_a_pattern_that_takes_for_ever(path: Path, base: nn.Module, pattern: str, field: str) -> None:
    folders.configure(path, **{field: {pattern: 8} if field == "rank_pattern" else pattern})
    start = time.perf_counter()
    report = check_checkpoint(path, base)
    assert time.perf_counter() - start < 2 + 1  # the guard waits one second; two cores may be busy
    # Some end at once on the names of this base, and exclude none of them.
    assert not report.ok or field == "exclude_modules", str(report)


def test_nothing_is_unpickled(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(PICKLE)
    (path / "training_args.bin").write_bytes(PICKLE)
    found = [f for f in check_checkpoint(path).findings if f.code == "LORA403"]
    assert [f.severity for f in found] == ["warning", "info"]
    assert found[0].observed == "the adapter is a pickle; it was not opened, so nothing in it was judged"
    asked = check_checkpoint(path, expect=Expect(read_pickle=True))
    (refused,) = asked.errors
    assert refused.observed.startswith("it is no archive of torch.save")
    assert not (tmp_path / "EXECUTED").exists()


def test_the_planted_pickle_would_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The proof above means something only if this pickle runs where it is unpickled."""
    import pickle

    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLE)
    assert (tmp_path / "EXECUTED").exists()


def test_no_code_of_the_folder_is_imported(
    path: Path, base: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evil = "open('EXECUTED', 'w')\nclass Evil: ...\n"
    for name in ("modeling.py", "evil_core.py", "conftest.py", "__init__.py"):
        (path / name).write_text(evil)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(path)
    folders.configure(
        path,
        auto_map={"AutoModel": "modeling.Evil", "AutoConfig": "modeling.Evil"},
        auto_mapping={"base_model_class": "Evil", "parent_library": "modeling"},
        megatron_config={"tensor_model_parallel_size": 1},
        megatron_core="evil_core",
    )
    (path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Evil"}}))
    report = check_checkpoint(path, base)
    assert not (tmp_path / "EXECUTED").exists()
    assert not {"modeling", "evil_core"} & set(sys.modules)
    (code,) = [f for f in report.findings if f.code == "LORA406"]
    assert "auto_map in adapter_config.json" in code.observed
    assert "none of it was run" in code.observed


def test_a_large_adapter_costs_little_memory(path: Path) -> None:
    folders.write_sparse(path, gigabytes=1)
    code = (
        "import resource, sys\nfrom pytest_lora import check_checkpoint\n"
        f"check_checkpoint({str(path.parent / 'small')!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"assert check_checkpoint({str(path)!r}).ok\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, 'torch' in sys.modules)\n"
    )
    (path.parent / "small").mkdir()
    for name in (CONFIG,):
        (path.parent / "small" / name).write_bytes((path / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, imports_torch = done.stdout.split()
    assert int(grown) < 50
    assert imports_torch == "False"


def _bytes_of(path: Path) -> bytes:
    return (path / WEIGHTS).read_bytes()


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[int, int, bytes]]:
    """Places in a file, what is taken out there, and what is put in."""
    place = st.integers(0, 1200)
    return draw(
        st.lists(
            st.tuples(
                place, st.integers(0, 3), st.binary(max_size=3) | st.sampled_from([b"0", b'"', b"{", b"9"])
            ),
            min_size=1,
            max_size=4,
        )
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations())
def test_whatever_is_read_the_library_reads_the_same(
    path: Path, changes: list[tuple[int, int, bytes]]
) -> None:
    """Stricter than safetensors only by names that stand there twice and by sizes; never more lenient."""
    if not (path / "sound").exists():
        (path / "sound").write_bytes(_bytes_of(path))
    content = (path / "sound").read_bytes()
    for place, gone, put in changes:
        content = content[:place] + put + content[place + gone :]
    (path / WEIGHTS).write_bytes(content)
    try:
        with Folder(path).opened(WEIGHTS) as (file, size):
            ours = {t.name: t.shape for t in read_header(file, size, WEIGHTS)}
    except UnreadableError as error:
        ours, why = None, error.fault.observed
    try:
        with safe_open(path / WEIGHTS, "pt") as opened:
            theirs = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError, AttributeError):
        theirs = None
    if ours is None:
        assert theirs is None or "twice" in why
    else:
        assert theirs == ours


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    names = Namespace(tmp_path_factory.mktemp("sources"))
    return [
        names.adapter(),
        names.adapter(use_dora=True, rank_pattern={"v_proj": 4}),
        names.adapter(modules_to_save=["lm_head"], target_modules=r".*\.(q|v)_proj"),
    ]


@pytest.mark.parametrize("part", range(2))
def test_damaged_folders_end_in_findings(
    sources: list[Path], base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """``benchmarks/checkpoint_fuzz.py`` does the same with 20,000 folders."""
    monkeypatch.chdir(tmp_path)
    start_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(1000 * part, 1000 * part + 150):
        target = tmp_path / "damaged"
        kinds = damaged(sources[seed % len(sources)], target, seed)
        start = time.perf_counter()
        report = check_checkpoint(target, base if seed % 25 == 0 else None)
        took = time.perf_counter() - start
        assert took < 3, (seed, kinds, took)
        assert json.loads(report.to_json())["ok"] == report.ok
        assert all(line.isprintable() for line in str(report).split("\n")), (seed, kinds)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_memory
    assert grown < 200 * 1024, f"{grown // 1024} MiB"
    assert not list(tmp_path.rglob("EXECUTED"))


def test_pickled_values_are_judged_by_their_bits(names: Namespace) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        path = folders.edit(
            names.adapter(), lambda t, d=dtype: {k: (v * float("nan")).to(d) for k, v in t.items()}
        )
        folders.pickle_weights(path)
        (found,) = check_checkpoint(path, expect=Expect(read_pickle=True)).errors
        assert found.code == "LORA441"


def test_more_numbers_than_a_file_can_hold_are_told_as_such(path: Path) -> None:
    with_header(path, shape=[2**40, 2**40])
    found = check_checkpoint(path)
    assert any("more numbers than any file can hold" in finding.observed for finding in found.errors)


@pytest.mark.parametrize(
    ("made", "architectures"),
    [
        ("LlamaForSequenceClassification", ["LlamaForSequenceClassification"]),
        ("GPT2ForSequenceClassification", ["LlamaForCausalLM"]),
        ("NoSuchClass", ["LlamaForCausalLM"]),
    ],
)
def test_the_class_of_the_adapter_is_built_where_it_fits_the_configuration(
    made: str, architectures: list[str]
) -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    found, task_type = _class_of_the_adapter(config, {"auto_mapping": {"base_model_class": made}})
    assert (found.architectures, task_type) == (architectures, None)
    assert config.architectures == ["LlamaForCausalLM"]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(
        st.sampled_from([(2, 3), (3, 2), (1, 1), (0, 2), (40, 3), (5,)]), min_size=1, max_size=12
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rng=st.randoms(use_true_random=False),
)
def test_tensors_that_are_looked_at_together_are_seen_as_each_alone(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, rng: random.Random, names: Namespace
) -> None:
    numbers = (0.0, 0.0, 1.0, -2.0, float("inf"), float("nan"))
    state = {
        f"m{n}.lora_{rng.choice('AB')}.weight": torch.tensor(
            [rng.choice(numbers[: rng.choice((2, 4, 6))]) for _ in range(math.prod(shape))], dtype=dtype
        ).reshape(shape)
        for n, shape in enumerate(shapes)
    }
    file = names.scratch / "x.safetensors"
    save_file(state, file)
    with pytest.MonkeyPatch.context() as patch, file.open("rb", buffering=0) as opened:
        patch.setattr(values, "CHUNK", 64)  # several parts of one tensor, several tensors in one part
        found, left = values.read_values(opened, read_header(opened, file.stat().st_size, "x"), "x")
    assert not left
    for name, tensor in state.items():
        seen, wide = found[name], tensor.double()
        assert (seen.nans, seen.infinities) == (int(wide.isnan().sum()), int(wide.isinf().sum()))
        assert seen.zero == (not wide.any())
        if ".lora_B" in name and wide.isfinite().all() and wide.numel():
            assert seen.rms == pytest.approx(wide.pow(2).mean().sqrt().item())
        if seen.marks:
            assert seen.marks.rows == tuple((wide != 0).any(1).tolist())
            assert seen.marks.columns == tuple((wide != 0).any(0).tolist())


def test_more_shapes_than_an_adapter_has_are_not_looked_at(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "MAX_FORMS", 1)
    assert "more than 1 different shapes" in finding(path, "LORA401").observed


def test_whatever_a_field_of_text_holds_is_judged(path: Path) -> None:
    sound = (path / CONFIG).read_text()
    for field in ("base_model_name_or_path", "task_type", "peft_type", "auto_mapping"):
        for value in (
            *ODD_VALUES,
            "a/b",
            "x" * 300,
            "~nobody-of-this-name/x",
            "meta-llama/Llama-2-7b-hf/" * 50,
        ):
            (path / CONFIG).write_bytes(
                json.dumps({**json.loads(sound), field: value}).encode("utf-8", "surrogatepass")
            )
            assert Report.from_json(check_checkpoint(path).to_json())
