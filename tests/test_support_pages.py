"""The pages on what merges and what is refused say what the table and the code say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import support_matrix
from zoo import FAMILIES, REFUSED

ROOT = Path(__file__).parent.parent
REASONING = [
    *(f"capture/{name}" for name in ("dynamo", "exported", "fidelity")),
    "model/batches",
    *(f"planning/{name}" for name in ("plan_graph", "solving", "streams")),
    *(f"reading/{name}" for name in ("axis", "layouts", "structure", "tokens", "weights")),
    *(f"rewriting/{name}" for name in ("carrying", "merging", "reducing", "sweep", "values")),
    "rewriting/writer",
]
REASONS = {"Mismatch": 0, "at": 1, "Masked": 0, "Positional": 0, "TomeError": 0, "error": 1}
REASONS |= dict.fromkeys(("NotCapturedError", "NotCaptured", "Refused", "CountsRefused"), 0)


def test_the_support_matrix_is_up_to_date() -> None:
    written = (ROOT / "docs" / "support-matrix.md").read_text()
    assert written == support_matrix.page(), (
        "run: python tests/support_matrix.py docs/support-matrix.md"
    )
    assert written.count("| merged") == len(FAMILIES)
    assert written.count("| refused") == len(REFUSED)


def test_every_reason_on_the_page_occurs_in_the_code() -> None:
    known = {text for name in REASONING for text in texts(name)}
    for reason in reasons_on_the_page():
        assert reason in known, reason


def test_every_reason_of_the_code_is_on_the_page() -> None:
    told = set(reasons_on_the_page())
    given = {reason for name in REASONING for reason in reasons(name)}
    assert len(given) > 40
    assert given <= told, given - told


def reasons_on_the_page() -> list[str]:
    page = (ROOT / "docs" / "when-refused.md").read_text()
    return re.findall(r"^\| `([^`]*)`", page, flags=re.MULTILINE)


def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / "tomepass" / f"{name}.py").read_text())


def texts(name: str) -> Iterator[str]:
    """Every text of a module, what is filled in as an ellipsis."""
    for node in ast.walk(tree_of(name)):
        if (text := text_of(node)) is not None:
            yield text


def reasons(name: str) -> Iterator[str]:
    """The texts that a module gives as reasons, as far as they stand in the call."""
    for node in ast.walk(tree_of(name)):
        reason: ast.AST | None = None
        if isinstance(node, ast.Call):
            called = node.func
            callee = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            place = REASONS.get(callee)
            if place is not None and place < len(node.args):
                reason = node.args[place]
        elif isinstance(node, ast.Return) and name == "reading/axis":
            reason = node.value
        text = text_of(reason)
        if text is not None and " " in text:
            yield text


def text_of(node: ast.AST | None) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        return "".join(map(str, parts))
    return None
