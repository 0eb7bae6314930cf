"""Index arithmetic and schedules of the CUDA kernels, run on the host over all sizes."""

from __future__ import annotations

import building
import emulated
import pytest


@pytest.mark.parametrize("header", ["pool_window", "schedule", "tiles"])
def test_is_what_its_definition_says(header, tmp_path):
    if (reason := building.unavailable()) is not None:
        pytest.skip(f"nothing can be compiled here: {reason}")
    emulated.run_program(header, tmp_path)
