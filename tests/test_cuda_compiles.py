"""Every CUDA kernel as nvcc compiles it: ptxas's report, and what instructions it is made of."""

from __future__ import annotations

import re
from pathlib import Path

import building
import machine_code
import pytest
from machine_code import Kernel, read, readable

if (reason := building.unavailable()) is not None:
    pytest.skip(f"nothing can be compiled here: {reason}", allow_module_level=True)

setup = building.load_setup()

#: Files without a kernel.
HOST = ("launch",)
#: Those that PSVIT_CUDA_ARCHS doesn't leave out.
BUILT = [name for name in setup.CUDA_KERNELS if setup.gencode_flags(name, setup.cuda_archs())]
SOURCES = [Path(name).stem for name in BUILT if Path(name).stem not in HOST]

#: Kernels without a product of matrices.
NO_PRODUCT = ("pool",)

REGISTERS = 64 * 1024  # of a multiprocessor, at least one block's


@pytest.fixture(scope="module")
def folder(cuda_objects) -> Path:
    found = cuda_objects.result()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    program = machine_code.find_cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump beside nvcc, on PATH or in Triton's package")
    return program


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_stay_in_registers_and_use_the_instructions_they_are_for(folder, cuobjdump, source):
    kernels = read(folder / f"{source}.o", cuobjdump)
    assert {kernel.architecture for kernel in kernels} == architectures(source)
    wrong = [f"{readable(k)}: {fault}" for k in kernels for fault in faults(source, k)]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("source", SOURCES)
def test_the_compiler_has_nothing_to_say(folder, source):
    """Nor that it makes products of the tensor cores wait for each other."""
    log = folder / f"{source}.o.log"
    said = [line for line in log.read_text().splitlines() if re.search("warning|Performance", line)]
    assert not said, "\n".join(said)


def architectures(source: str) -> set[str]:
    if source.endswith("_hopper"):
        return {"sm_90a"}
    return {f"sm_{number}" for number in setup.numbers(setup.cuda_archs())}


def faults(source: str, kernel: Kernel) -> list[str]:
    found = []
    if kernel.stack or kernel.spills:
        found.append(f"{kernel.stack} bytes of stack, {kernel.spills} of spills")
    if not kernel.threads:
        found.append("no launch bounds")
    if kernel.threads * -(-kernel.registers // 8) * 8 > REGISTERS:
        found.append(f"{kernel.registers} registers for {kernel.threads} threads")

    def uses(*patterns: str) -> bool:
        return any(re.match(p, name) for p in patterns for name in kernel.instructions)

    if uses("LDL", "STL"):
        found.append("local memory")
    product = "HGMMA" if source.endswith("_hopper") else "HMMA"
    if source not in NO_PRODUCT and not uses(product):
        found.append(f"no {product}")
    if not uses(r"LDG\.E.*\.128", r"LDGSTS\.E.*\.128", "UTMALDG", "UBLKCP"):
        found.append("no loads of 16 bytes")
    if not uses(r"STG\.E.*\.128", "UTMASTG"):
        found.append("no stores of 16 bytes")
    return found
