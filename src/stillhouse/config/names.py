"""Names from recipes that become names of files and folders."""

from __future__ import annotations

from stillhouse.config.messages import shown
from stillhouse.errors import UserError

LONGEST = 120


def folder_name(name: object, where: str) -> str:
    """The name, which is one that a file or folder inside another can have.

    Raises:
        UserError: what leads out of that folder (`..`, an absolute path, a slash), no text, or too long a text.

    >>> folder_name("ce-0.1", "variants")
    'ce-0.1'
    """
    if not isinstance(name, str):
        raise UserError(f"{where}: a name must be text; given: {shown(name)} (put it in quotes).")
    if not name.strip() or len(name.encode("utf-8", "replace")) > LONGEST:
        raise UserError(f"{where}: a name has 1 to {LONGEST} characters; given: {shown(name)}.")
    if name in (".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
        raise UserError(
            f"{where}: {shown(name)} cannot name a folder; take letters, digits, dashes, dots, without slashes."
        )
    return name
