"""What a file is that is not what its name says, by its first bytes."""

from __future__ import annotations

from pytest_lora.facts.checkpoint import FileFault

FIRST = 64
"""Bytes that are enough to tell."""


def mistaken(content: bytes, name: str) -> FileFault | None:
    """The fault of a file that begins like something else; None where it does not."""
    start = content[:FIRST].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return FileFault(
            name,
            "pointer",
            "it is a pointer of Git LFS: the text that stands for a file that was not fetched",
        )
    if start.startswith((b"<!doctype html", b"<html")):
        return FileFault(name, "format", "it is an HTML page, as a server sends in place of a file")
    if content.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return FileFault(name, "pickle", "it is a pickle or a zip archive, as torch.save writes them")
    if content.startswith(b"GGUF"):
        return FileFault(name, "format", "it is a GGUF file, as llama.cpp has them")
    return None
