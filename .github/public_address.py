"""Writes where the project stands into what is built from this checkout: ``python .github/public_address.py URL REF``.

The repository does not know its own address. The workflow that releases it does: URL is ``https://github.com/OWNER/NAME``
and REF the tag or branch. PyPI shows the README without the files beside it, so its links become absolute.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RELATIVE_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)\s]+)\)")


def with_absolute_links(text: str, url: str, ref: str) -> str:
    """The Markdown with every relative link, and every relative image, below the address."""

    def absolute(link: re.Match[str]) -> str:
        image, label, path = link.groups()
        return f"{image}{label}({url}/{'raw' if image else 'blob'}/{ref}/{path})"

    return RELATIVE_LINK.sub(absolute, text)


def with_urls(text: str, url: str, ref: str) -> str:
    """The pyproject.toml with the table of addresses that PyPI shows."""
    urls = {
        "Source": url,
        "Documentation": f"{url}/tree/{ref}/docs",
        "Changelog": f"{url}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    table = "".join(f'{name} = "{address}"\n' for name, address in urls.items())
    return f"{text}\n[project.urls]\n{table}"


if __name__ == "__main__":
    url, ref = sys.argv[1].rstrip("/"), sys.argv[2]
    for name, changed in (("README.md", with_absolute_links), ("pyproject.toml", with_urls)):
        path = ROOT / name
        path.write_text(changed(path.read_text(), url, ref))
