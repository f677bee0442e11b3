"""Errors that a user can fix: each is one sentence that names the place and the nearest valid value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A request cannot be carried out; the message says what, where and what to do. The command exits with code 2."""


class MissingExtra(UserError, ImportError):
    """An optional dependency is absent; the message names the extra to install."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra '{extra}': pip install 'stillhouse[{extra}]'.")


class TrainingDiverged(UserError):
    """A loss became NaN or infinite; the message names the step and the terms. The last good checkpoint stays."""


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """The valid names closest in spelling to `name`, best first (at most `count`; may be empty). What all begin with,
    as `timm:`, does not count.

    >>> nearest("kind:corp", ["kind:crop", "kind:scale"])
    ['kind:crop']
    """
    names = [str(v) for v in valid]
    for mark in ".:":
        same = name[: name.rfind(mark) + 1]
        if same and all(v.startswith(same) for v in names):
            return [same + v for v in nearest(name.removeprefix(same), [v.removeprefix(same) for v in names], count)]
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.65)
    lowered = name.lower()
    close += [
        v
        for v in names
        if v not in close and ((len(lowered) > 1 and lowered in v.lower()) or (len(v) > 2 and v.lower() in lowered))
    ]
    return close[:count]


def unknown(what: str, name: str, valid: Iterable[str], where: str = "") -> UserError:
    """A `UserError` for a name that does not exist (`where`: such as ` of 'kd'`), with the nearest that do.

    >>> str(unknown("objective", "kdd", ["ce", "kd"]))
    "There is no objective 'kdd'; did you mean 'kd'?"
    >>> str(unknown("teacher", "big", [], " in this recipe"))
    "There is no teacher 'big' in this recipe; there are none."
    """
    names = list(valid)
    close = nearest(name, names)
    if close:
        return UserError(f"There is no {what} '{name}'{where}; did you mean {' or '.join(repr(c) for c in close)}?")
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return UserError(f"There is no {what} '{name}'{where}; there are{': ' + listed if listed else ' none'}.")
