"""The names of the arguments of a callable, to say which one was meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def argument_names(function: Callable[..., Any]) -> list[str] | None:
    """The names of the arguments; None where any name can be given, or where a function of torch tells none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message that says which of the ``known`` names is like ``name``; empty where none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
