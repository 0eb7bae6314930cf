"""What was measured on a machine, kept as JSON in the user's cache folder.

A damaged file counts as none, and where nothing can be kept that is a warning, once: measuring
again is all that is lost.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any


def file_of(what: str) -> Path:
    """Where measured rates or latencies are kept: ``what`` names the file.

    Raises:
        RuntimeError: nobody knows where this user's files are.
    """
    asked = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(asked):  # the specification wants others ignored
        folder = Path(asked)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path.home() / ".cache"
    return folder / "psvit" / f"{what}.json"


def read(what: str) -> dict[str, Any]:
    """By key, what this or another process kept earlier."""
    try:
        content = json.loads(file_of(what).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:
        warn_once(f"kept {what} could not be read ({error}); they are measured again")
        return {}


def keep(what: str, key: str, found: dict[str, float]) -> None:
    """Renames a whole file into place: who reads it meanwhile sees the old or the new one."""
    try:
        path = file_of(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**read(what), key: found}, indent=1)
        handle, new = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(content)
            os.replace(new, path)
        except OSError:
            os.unlink(new)
            raise
    except (OSError, RuntimeError) as error:
        warn_once(f"measured {what} could not be kept ({error}); every process measures them again")


@cache
def warn_once(text: str) -> None:
    """Once for each text."""
    warnings.warn(f"psvit_kernels: {text}", stacklevel=4)
