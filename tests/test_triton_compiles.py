"""Every Triton kernel and configuration, compiled for GPUs that need not be here."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from psvit_kernels.triton import interpreting

if interpreting():
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

import ahead_of_time as aot

ARCHITECTURES = (80, 90, 100)

#: What a product of half precision must have become.
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

#: Kernels without a product.
NO_PRODUCT = ("_pool", "_delta")


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest):
    """All that was asked for, compiled by as many processes as there are processors."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        found: dict[tuple[str, int], Future] = {}
        for item in request.session.items:
            call = getattr(item, "callspec", None)
            if call is not None and item.path == request.path:
                key = (call.params["case"], call.params["architecture"])
                found[key] = pool.submit(aot.compiled_case, key[0], "cuda", key[1], 32)
        yield found
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", aot.CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits_of_the_chip(jobs, case, architecture):
    results = jobs[case, architecture].result()
    assert results
    for one in results:
        what = f"{one.name} for sm_{architecture}: {one.registers} registers"
        assert one.stack == 0, f"{what}: {one.stack} bytes of spills"
        assert one.shared <= aot.SHARED[architecture], f"{what}: {one.shared} bytes shared"
        exact = "float32" in case
        if not exact and not any(part in one.name for part in NO_PRODUCT):
            assert TENSOR_CORES[architecture] in one.assembly, f"{what}: no tensor cores"
