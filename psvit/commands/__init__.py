"""The commands of ``psvit``: each module has ``EXAMPLES``, ``add_arguments`` and ``run``."""
