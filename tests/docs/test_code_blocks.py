"""Every code block of README.md and docs/ is executed, and what is shown as output is what comes out.

Python blocks are test files of one pytest session, each in a folder of its own beside the page's last conftest.py;
names that they take for granted come from preamble.py. Blocks of sh are commands: pytest runs them where that is cheap,
and else collects only, which refuses options that there are not. A block without a language is output, of the block of
Python above it; where the comment ``<!-- fails -->`` is above that one, its test fails. A block that is not executed
says why: ``<!-- skip: reason -->``.
"""

from __future__ import annotations

import ast
import builtins
import configparser
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from hypothesis import settings

import pytest_lora
from pytest_lora.__main__ import main as command_line
from pytest_lora.assertions import delivered
from pytest_lora.plugin.options import TABLE
from tests.docs import preamble
from tests.docs.blocks import ROOT, Block, blocks

ALL = tuple(blocks())
OUTPUT = ("", "text")


def of(*languages: str, remark: str | None = None) -> list[pytest.ParameterSet]:
    """Blocks in these languages, those that say why they are not executed aside."""
    wanted = [b for b in ALL if b.language in languages and b.remark != "skip"]
    return [pytest.param(b, id=f"{b.page}:{b.line}") for b in wanted if remark in (None, b.remark)]


def missing_names(code: str) -> list[str]:
    """Names that a block uses and does not make, as far as the preamble has them."""
    nodes = list(ast.walk(ast.parse(code)))
    made = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    made |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    made |= {
        a.asname or a.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names
    }
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    unknown = used - made - set(vars(builtins))
    return sorted(unknown & {*preamble.NAMES, *COMMON})


COMMON = {
    "AutoModelForCausalLM": "transformers",
    "LoraConfig": "peft",
    "pytest": "",
    **dict.fromkeys(pytest_lora.__all__, "pytest_lora"),
}
"""Names that later blocks of a page use without importing them again."""


def as_test_file(block: Block) -> str:
    """The block at its own line numbers, after the imports of what it takes for granted."""
    lines = ["from __future__ import annotations"]
    for name in missing_names(block.code):
        home = COMMON.get(name, "tests.docs.preamble")
        lines.append(f"from {home} import {name}" if home else f"import {name}")
    return "; ".join(lines) + "\n" * (block.line - 1) + block.code


class Outcomes:
    """What became of each block's tests: outcomes and text by the name of the block."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {}
        self.text: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid:
            self._add(report.nodeid, "failed", report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = f"{report.longreprtext}\n{report.capstdout if report.when == 'call' else ''}"
        if report.when == "call" or report.outcome != "passed":
            self._add(report.nodeid, report.outcome, text)

    def _add(self, nodeid: str, outcome: str, text: str) -> None:
        name = nodeid.partition("/")[0]
        self.outcomes.setdefault(name, []).append(outcome)
        self.text[name] = f"{self.text.get(name, '')}\n{text}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that blocks and commands name."""
    folder = tmp_path_factory.mktemp("place")
    preamble.lay_out(folder)
    return folder


LEFT_OUT = ("-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:anyio", "-p", "no:html")
"""What has no part in these sessions: the second looks ten times for garbage among all that torch brings, which is
four fifths of a session that only collects, and the session around them does so too."""


def run_pytest(place: Path, *args: str, plugins: tuple[object, ...] = ()) -> int:
    """Run pytest in this process, which has imported torch already, and leave nothing of it behind."""
    profile = settings.get_current_profile_name()
    with chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        patch.setenv("COLUMNS", "120")
        patch.setenv("HF_HUB_OFFLINE", "1")
        code = int(pytest.main([*LEFT_OUT, *args], plugins=plugins))
    settings.load_profile(profile)
    delivered.clear()
    return code


@pytest.fixture(scope="module")
def outcomes(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """One session over all blocks of Python."""
    root = tmp_path_factory.mktemp("blocks")
    fixtures = {}
    for block in ALL:
        if block.language != "python" or block.remark == "skip":
            continue
        folder = root / block.name
        folder.mkdir()
        if block.title == "conftest.py":
            fixtures[block.page] = as_test_file(block)
            code = "def test_fixtures(lora_model): ..."
        else:
            code = as_test_file(block)
            if "def test_" not in code and "TestCase" not in code:
                code += "\ndef test_block_ran(): ...\n"
        if block.page in fixtures:
            (folder / "conftest.py").write_text(fixtures[block.page])
        (folder / f"test_{block.name}.py").write_text(code)
    seen = Outcomes()
    settings.register_profile("docs", deadline=None, max_examples=2, stateful_step_count=3, database=None)
    run_pytest(
        place,
        "--import-mode=importlib",
        "--continue-on-collection-errors",
        "--hypothesis-profile=docs",
        "--lora-ranks=16",  # for a sweep that leaves them to the options: the one that it asserts
        "--durations=8",
        f"--rootdir={root}",
        str(root),
        plugins=(seen,),
    )
    return seen


SKIPPED = [b for b in ALL if b.language == "python" and b.remark == "skip"]


@pytest.mark.parametrize("block", SKIPPED, ids=lambda b: f"{b.page}:{b.line}")
def test_what_is_not_executed_names_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest_lora"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("block", of("python"))
def test_python(block: Block, outcomes: Outcomes) -> None:
    got = outcomes.outcomes.get(block.name, [])
    expected = {"failed"} if block.remark == "fails" else {"passed"}
    if "lora_gpu" in block.code or "lora_vram_limit" in block.code:
        expected |= {"skipped"}
    assert got, f"nothing of {block.name} ran"
    assert set(got) <= expected, outcomes.text[block.name]


def outputs() -> Iterator[pytest.ParameterSet]:
    """Blocks of output, each with the block of Python above it."""
    above: dict[str, Block] = {}
    for block in ALL:
        if block.language == "python":
            above[block.page] = block
        elif block.language in OUTPUT and block.remark != "skip":
            yield pytest.param(block, above[block.page], id=f"{block.page}:{block.line}")


@pytest.mark.parametrize(("block", "source"), list(outputs()))
def test_output_is_what_comes_out(block: Block, source: Block, outcomes: Outcomes) -> None:
    text = outcomes.text[source.name]
    assert re.search(pattern(block.code), f"\n{plain(text)}\n"), text


def plain(text: str) -> str:
    """Lines without their margins, in which pytest marks errors, and without the class of an assertion's error."""
    margin = r"^(E(?= ))?\s*(pytest_lora\.LoraHealthError: )?"
    return "\n".join(re.sub(margin, "", line).rstrip() for line in text.splitlines())


def pattern(shown: str) -> str:
    """The lines that are shown, one after the other; a line of three dots stands for any lines."""
    lines = plain(shown).strip().splitlines()
    return r"\n" + "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in lines)


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block, as words without comments and environment variables."""
    for line in block.code.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield [words[0].rpartition("/")[2], *words[1:]]


@pytest.mark.parametrize("block", of("sh"))
def test_commands(block: Block, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, *args in commands(block):
        require_valid(name, args, place)
    assert "\nERROR" not in capsys.readouterr().err


def require_valid(name: str, args: list[str], place: Path) -> None:
    """Run a command of pytest, or let it collect only; of others see that what they name is there."""
    match name:
        case "pytest" if "--lora-demo" in args:
            pass  # tests/plugin/test_demo.py runs it
        case "pytest":
            is_cheap = any(arg.startswith(("--lora-adapters", "adapters/")) for arg in args)
            code = run_pytest(place, f"--rootdir={place}", *args, *([] if is_cheap else ["--collect-only"]))
            good = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
            # Nothing is collected here, and with this option that is a failure.
            assert code in (
                good | {pytest.ExitCode.TESTS_FAILED} if "--lora-require-gpu" in args else good
            ), args
        case "python" if args[:2] == ["-m", "pytest_lora"]:
            with chdir(place):
                assert command_line(args[2:]) in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), args
            delivered.clear()
        case "." | "pip" | "python3" | "python" | "mkdocs":
            require_files_and_extras(args)
        case _:
            pytest.fail(f"nobody executes {name!r}")


def require_files_and_extras(args: list[str]) -> None:
    """Extras that are named have to be in pyproject.toml, scripts in the repository, with the options that they get."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for arg in args:
        if found := re.fullmatch(r"(?:\.|(?:/opt/)?pytest-lora)\[(.+)\]", arg):
            assert set(found[1].split(",")) <= set(extras), arg
        elif arg.endswith(".py"):
            code = (ROOT / arg).read_text()
            assert all(option.partition("=")[0] in code for option in args if option.startswith("--")), args


@pytest.mark.parametrize("block", of("yaml", "toml", "ini"))
def test_settings_can_be_read(block: Block, place: Path) -> None:
    if block.language == "yaml":
        assert yaml.safe_load(block.code)
        for script in re.findall(r"^\s*(?:- )?((?:pytest|pip) .+)$", block.code, flags=re.M):
            for name, *args in commands(Block(block.page, block.line, "sh", "", "", "", script)):
                require_valid(name, args, place)
    elif block.language == "toml":
        assert tomllib.loads(block.code)
    else:
        parser = configparser.ConfigParser()
        parser.read_string(block.code)
        assert set(parser["pytest"]) <= {f"lora_{option.name}" for option in TABLE if option.ini is not None}


def test_each_block_is_executed_or_says_why_not() -> None:
    for block in ALL:
        where = f"{block.page}:{block.line}"
        assert block.language in ("python", "sh", "yaml", "toml", "ini", *OUTPUT), where
        assert block.remark != "skip" or len(block.about) > 10, f"{where}: the reason is missing"
