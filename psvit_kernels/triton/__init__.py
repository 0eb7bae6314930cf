"""The Triton provider: its kernels, and in ``provider.py`` what of them serves a call."""

from __future__ import annotations

import os


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
