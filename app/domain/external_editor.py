"""Text in the editor that the user has chosen."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from trainer.contract.errors import UserError


def edited(text: str, name: str) -> str | None:
    """Show a text in `$VISUAL`, `$EDITOR` or vi; return what was saved. None: the editor failed.

    Args:
        text: what to edit.
        name: name of the temporary file, for the editor's colours.

    Raises:
        UserError: the editor cannot be started, or what it wrote is not UTF-8.
    """
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory(prefix="menma-") as folder:
        file = Path(folder) / name
        file.write_bytes(text.encode())
        try:
            code = subprocess.call([*shlex.split(editor), str(file)])
        except (OSError, ValueError) as error:
            raise UserError(
                f"the editor {editor!r} cannot be started: {error}", hint="set EDITOR"
            ) from error
        try:
            after = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"what {editor!r} has saved cannot be read: {error}") from error
    return None if code else after
