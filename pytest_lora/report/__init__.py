"""The report on a session: data in, text out."""

from __future__ import annotations

from pytest_lora.report.session import Session

FORMATS = {
    ".sarif.json": "SARIF",
    ".sarif": "SARIF",
    ".html": "HTML",
    ".md": "Markdown",
    ".json": "JSON",
}
"""Formats of a report by the end of its file's name, the longest first."""

GITLAB = ("gl-code-quality", "gitlab-code-quality")
"""How the name of a JSON file begins that is GitLab's code quality report."""


def format_of(name: str) -> str:
    """The format that the name of a file stands for; empty where it stands for none."""
    name = name.lower()
    if name.endswith(".json") and name.startswith(GITLAB):
        return "GitLab"
    return next((known for ending, known in FORMATS.items() if name.endswith(ending)), "")


def rendered(session: Session, name: str) -> str:
    """A session as text in the format that a file's name stands for.

    Raises:
        ValueError: It stands for none.
    """
    match format_of(name):
        case "JSON":
            return session.to_json() + "\n"
        case "Markdown":
            from pytest_lora.report.markdown import markdown_report

            return markdown_report(session)
        case "HTML":
            from pytest_lora.report.page import page

            return page(session)
        case "SARIF":
            from pytest_lora.report.code_review import sarif_report

            return sarif_report(session)
        case "GitLab":
            from pytest_lora.report.code_review import gitlab_report

            return gitlab_report(session)
    raise ValueError(f"there is no report in {name!r}; known are {', '.join(FORMATS)}")
