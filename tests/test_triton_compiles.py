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

#: Kernels without a product for tensor cores.
NO_PRODUCT = ("_pool", "_delta", "_exponentials", "_merge", "_match", "_reduce")  # a match is exact


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
                found[key] = pool.submit(aot.compiled_case, key[0], *aot.TARGETS[f"sm_{key[1]}"])
        yield found
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", aot.CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits_of_the_chip(jobs, case, architecture):
    """No spills, no more shared memory than there is, products on the tensor cores."""
    if architecture < 89 and "e4m3" in case:
        pytest.skip("e4m3 needs compute capability 8.9; the provider refuses it below")
    results = jobs[case, architecture].result()
    assert results
    wrong = [text for one in results for text in faults(one, architecture, "float32" in case)]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def faults(one: aot.Compiled, architecture: int, exact: bool) -> list[str]:
    what = f"sm_{architecture}, {one.registers} registers, {one.name}"
    found = []
    if one.stack:
        found.append(f"{what}: {one.stack} bytes of spills")
    if one.shared > aot.SHARED[architecture]:
        found.append(f"{what}: {one.shared} bytes of shared memory")
    product = not exact and not any(part in one.name for part in NO_PRODUCT)
    if product and TENSOR_CORES[architecture] not in one.assembly:
        found.append(f"{what}: no {TENSOR_CORES[architecture]}")
    return found
