"""Tables that commands put into documents."""

from __future__ import annotations

from pathlib import Path


def filled(document: str, name: str, text: str) -> str:
    r"""Return a document with `text` between its lines ``<!-- name -->`` and ``<!-- /name -->``.

    Raises
    ------
    ValueError
        If it has no such lines.

    Examples
    --------
    >>> filled("<!-- speed -->\nold\n<!-- /speed -->\n", "speed", "new")
    '<!-- speed -->\nnew\n<!-- /speed -->\n'
    """
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    start, end = (document.find(mark) for mark in marks)
    if not 0 <= start < end:
        message = f"The document has no lines {marks[0]} and {marks[1]}, in this order; add them."
        raise ValueError(message)
    return f"{document[: start + len(marks[0])]}\n{text}\n{document[end:]}"


def fill(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks of a file; see `filled`."""
    document = path.read_text(encoding="utf-8")
    path.write_text(filled(document, name, text), encoding="utf-8")
