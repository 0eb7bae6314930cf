"""The tests of the operations on Triton's kernels, in Triton's interpreter on the CPU.

Each file runs in a process of its own with TRITON_INTERPRET=1, which must be there before Triton is
imported; all of them at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from psvit_kernels.triton import interpreting

if interpreting():
    pytest.skip("this is the interpreter already", allow_module_level=True)
pytest.importorskip("triton")

HERE = Path(__file__).parent

FILES = (
    "test_attention.py",
    "test_apply_attention.py",
    "test_quantized_map.py",
    "test_token_pool.py",
    "test_maps.py",
    "test_registration.py",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """One process a file, started together, and where its output goes."""
    folder = tmp_path_factory.mktemp("interpreter")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [str(Path(sys.executable).with_name("pytest")), "-p", "no:cacheprovider"]
    running = {}
    for name in FILES:
        log = folder / name
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, "-k", "triton", str(HERE / name)],
                cwd=HERE, env=environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        running[name] = process, log
    yield running
    for process, _ in running.values():
        process.kill()


@pytest.mark.parametrize("name", FILES)
def test_kernels_pass_in_the_interpreter(runs, name):
    process, log = runs[name]
    process.wait()
    if process.returncode:
        pytest.fail(log.read_text()[-6000:], pytrace=False)
    assert " passed" in log.read_text()
