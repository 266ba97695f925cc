"""The report on a session: data in, text out."""

from __future__ import annotations

from pytest_lora.report.session import Session


def rendered(session: Session, ending: str) -> str:
    """A session as text in the format of a file's ending: ``".html"``, ``".md"`` or ``".json"``.

    Raises:
        ValueError: There is no such format.
    """
    if ending == ".json":
        return session.to_json() + "\n"
    if ending == ".md":
        from pytest_lora.report.markdown import markdown_report

        return markdown_report(session)
    if ending == ".html":
        from pytest_lora.report.page import page

        return page(session)
    raise ValueError(f"there is no report in {ending!r}; known are .html, .md and .json")
