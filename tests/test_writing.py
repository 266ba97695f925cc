"""Files are written whole: on a full or read-only disk, under an interrupt and a kill, the old one stays."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.files import append_whole, text_of, write_whole
from pytest_lora.plugin import baseline_gate
from pytest_lora.sweep.lock import RankLock
from tests.forked import fork

CALLS = ("tempfile.mkstemp", "os.fsync", "os.chmod", "os.replace")
ERRORS: tuple[BaseException, ...] = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EROFS, "Read-only file system"),
    KeyboardInterrupt(),
)
text = st.text(st.characters(codec="utf-8") | st.just("\ud800"), max_size=200)


@settings(max_examples=200, deadline=None)
@given(old=st.none() | st.binary(max_size=200), new=text | st.binary(max_size=200), link=st.booleans())
def test_a_file_is_replaced_and_nothing_is_left_beside_it(
    tmp_path_factory: pytest.TempPathFactory, old: bytes | None, new: str | bytes, link: bool
) -> None:
    home = tmp_path_factory.mktemp("writing")
    file = home / "deeper" / "out.json"
    if old is not None:
        file.parent.mkdir()
        file.write_bytes(old)
        file.chmod(0o640)
    if old is not None and link:
        file = home / "link.json"
        file.symlink_to(home / "deeper" / "out.json")
    write_whole(file, new)
    assert file.read_bytes() == (new.encode("utf-8", "backslashreplace") if isinstance(new, str) else new)
    assert [path.name for path in (home / "deeper").iterdir()] == ["out.json"]
    assert file.is_symlink() == (old is not None and link)
    assert file.stat().st_mode & 0o777 == (0o644 if old is None else 0o640)


@settings(max_examples=100, deadline=None)
@given(old=st.none() | st.binary(max_size=200), call=st.sampled_from(CALLS), error=st.sampled_from(ERRORS))
def test_what_cannot_be_written_is_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, old: bytes | None, call: str, error: BaseException
) -> None:
    file = tmp_path_factory.mktemp("writing") / "out.json"
    if old is not None:
        file.write_bytes(old)
    with patch(call, side_effect=error), pytest.raises(type(error)):
        write_whole(file, "new")
    assert [path.read_bytes() for path in file.parent.iterdir()] == ([] if old is None else [old])


def write_for_ever(file: Path) -> int:
    for n in itertools.count():
        write_whole(file, f"{n % 10}" * 200_000)
    return 0


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    for attempt in range(10):
        file = tmp_path / f"out{attempt % 2}.txt"  # two begin without a file
        pid = fork(partial(write_for_ever, file))
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01 * attempt)
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        found = file.read_text()
        assert len(found) == 200_000
        assert len(set(found)) == 1


@settings(max_examples=60, deadline=None)
@given(
    old=st.none() | st.binary(max_size=50), new=text, room=st.integers(0, 100), at_once=st.integers(1, 100)
)
def test_what_is_added_is_added_whole_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, old: bytes | None, new: str, room: int, at_once: int
) -> None:
    file = tmp_path_factory.mktemp("adding") / "summary.md"
    if old is not None:
        file.write_bytes(old)
    write, left = os.write, [room]

    def short(handle: int, data: bytes) -> int:
        taken = write(handle, data[: min(left[0], at_once)])
        left[0] -= taken
        if data and not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return taken

    data = new.encode("utf-8", "backslashreplace")
    with patch("os.write", short):
        if len(data) <= room:
            append_whole(file, new)
        else:
            with pytest.raises(OSError, match="No space"):
                append_whole(file, new)
    assert file.read_bytes() == (old or b"") + (data if len(data) <= room else b"")


PLACES = ("pipe", "zeros", "hole", "folder")


@pytest.fixture(params=PLACES)
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What has a name and is no file that anybody reads to its end."""
    place = tmp_path / "place"
    if request.param == "zeros":
        return Path("/dev/zero")
    if request.param == "folder":
        place.mkdir()
    elif request.param == "pipe":
        os.mkfifo(place)
    else:
        place.touch()
        os.truncate(place, 2**40)
    return place


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_what_is_no_file_is_neither_waited_for_nor_replaced(no_file: Path) -> None:
    before = no_file.stat()
    is_hole = no_file.is_file()
    with pytest.raises(OSError, match=r"more than|no file|directory"):
        text_of(no_file, 1000)
    with pytest.raises(ValueError, match="cannot be read"):
        RankLock.read(no_file)
    with pytest.raises(pytest.UsageError, match="cannot be read"):
        baseline_gate.read(no_file, update=True)
    if not is_hole:
        with pytest.raises(OSError, match=r"no file|directory"):
            write_whole(no_file, "new")
    if before.st_mode != Path("/dev/zero").stat().st_mode and not is_hole:
        with pytest.raises(OSError, match=r"device|directory"):
            append_whole(no_file, "new")
    after = no_file.stat()
    assert (before.st_mode, before.st_ino, before.st_size) == (after.st_mode, after.st_ino, after.st_size)
