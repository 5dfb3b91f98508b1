"""Every error this library raises on purpose, and the words they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PosthocError(Exception):
    """Base of all errors of posthoc. Its message says what was given, what was expected and how to mend it."""


class NotFittedError(PosthocError):
    """Something was asked of a head that has not been fitted yet."""


class BackboneError(PosthocError):
    """A backbone cannot be wrapped, lacks what a head needs, or is not the one an adapter was fitted on."""


class DataError(PosthocError):
    """Images, labels or features are not usable as they are."""


class AdapterError(PosthocError):
    """Adapter files are missing, damaged, tampered with, or of an unknown schema."""


class OptionError(PosthocError):
    """An unknown name or a value out of range was given as an option."""


MANY = 40
"""Names beyond which an error tells the nearest only."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the nearest known name, and all of them, or the nearest of many.

    >>> suggest("kapa", ["kappa", "loss"])
    "did you mean 'kappa'? Known: kappa, loss."
    """
    known = sorted(known)
    close = difflib.get_close_matches(name[:100], known, n=1)  # its time grows with a name that may be a stranger's
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(known) > MANY:
        near = difflib.get_close_matches(name[:100], known, n=5, cutoff=0.3) or known[:5]
        return f"{hint}Known: {', '.join(near)} and {len(known) - len(near)} more."
    return f"{hint}Known: {', '.join(known)}."
