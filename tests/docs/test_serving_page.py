"""docs/serving.md shows the tables of facts/servers.py; run this file to print them."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.facts.servers import SERVERS
from pytest_lora.rules.serving_words import NAMES
from tests.docs.blocks import ROOT


def matrix() -> Iterator[str]:
    """A line for each feature, a column for each server."""
    yield "| | " + " | ".join(f"`{name}`" for name in SERVERS) + " |"
    yield "| --- |" + " --- |" * len(SERVERS)
    for feature, words in NAMES.items():
        cells = [server.features.get(feature) for server in SERVERS.values()]
        if any(cells):
            outcomes = (cell.outcome if cell else "" for cell in cells)
            yield f"| {words} | " + " | ".join(outcomes) + " |"


def sections() -> Iterator[str]:
    """For each server where it was read, and what it does."""
    for name, server in SERVERS.items():
        link = f"[{server.repository}](https://github.com/{server.repository})"
        yield f"### `{name}`: {server.name}"
        yield f"{link}: {server.source}".replace("__", r"\_\_")
        yield "| | | |\n| --- | --- | --- |"
        yield from (
            f"| {NAMES[feature]} | {treatment.outcome} | it {treatment.reason} |"
            for feature, treatment in server.features.items()
        )


def test_the_page_shows_every_line() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    assert "\n".join(matrix()) in text
    assert [line for line in sections() if line not in text] == []


if __name__ == "__main__":
    print("\n".join(matrix()))
    for line in sections():
        print(f"\n{line}\n" if line.startswith(("#", "[")) else line)
