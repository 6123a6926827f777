"""Errors that a user can mend: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or config. Shown as one message without a traceback.

    what: what was found and what was expected; where: the file, column, label or config key;
    fix: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(f"{where}: {what}\n  Fix: {fix}")


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """The closest valid choices to `word` as text for an error message."""
    choices = [str(c) for c in choices]
    close = difflib.get_close_matches(str(word), choices, n=n, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"choose one of: {shown}" if choices else "there is no valid choice"
