"""Index arithmetic of the sm_80 kernels, on the host."""

from __future__ import annotations

import building
import emulated
import pytest


def test_every_element_has_one_place_and_ldmatrix_finds_no_conflict_of_banks(tmp_path):
    if (reason := building.unavailable()) is not None:
        pytest.skip(f"nothing can be compiled here: {reason}")
    emulated.run_program("tiles", tmp_path)
