"""Block sizes, warps and stages that each kernel is tried with; the first of a list is the default.

Nothing here has been measured yet: the defaults come from counting registers and shared memory.
"""

from __future__ import annotations

from triton import Config  # noqa: F401
