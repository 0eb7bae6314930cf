"""The tests of the operations on Triton's kernels, in Triton's interpreter on the CPU.

They run in processes of their own, with TRITON_INTERPRET=1, which must be there before Triton is
imported; ``interpreter_runs`` in ``conftest.py`` starts them with the session's first test, so that
they use the time in which other tests leave a core idle.
"""

from __future__ import annotations

import pytest

from psvit_kernels.triton import interpreting

if interpreting():
    pytest.skip("this is the interpreter already", allow_module_level=True)
pytest.importorskip("triton")


@pytest.mark.parametrize(
    "files",
    [
        "test_attention.py test_maps.py test_quantized_map.py test_registration.py",
        "test_apply_attention.py test_merging.py test_reduce_map.py test_token_pool.py"
        " test_triton_limits.py",
    ],
)
def test_kernels_pass_in_the_interpreter(interpreter_runs, files):
    process, log = interpreter_runs[files]
    process.wait()
    if process.returncode:
        pytest.fail(log.read_text()[-6000:], pytrace=False)
    assert " passed" in log.read_text()
