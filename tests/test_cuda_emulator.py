"""The emulator, on which all trust in the CUDA kernels rests where there is no GPU."""

from __future__ import annotations

import building
import emulated
import pytest

EMULATOR = ("tests/cuda/emulator.cpp", "tests/cuda/halves.cpp")


@pytest.fixture(autouse=True)
def compiler():
    if (reason := building.unavailable()) is not None:
        pytest.skip(f"nothing can be compiled here: {reason}")


def test_computes_what_the_ptx_isa_says(tmp_path):
    emulated.run_program("emulator", tmp_path, *EMULATOR)


def test_finds_faults_and_none_where_there_is_none(tmp_path):
    emulated.run_program("emulator_faults", tmp_path, *EMULATOR)
