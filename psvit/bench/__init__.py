"""``psvit bench``: the operations and a whole model against what people write without psvit."""

from .command import add_arguments, main

__all__ = ["add_arguments", "main"]
