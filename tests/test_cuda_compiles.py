"""Every CUDA kernel as nvcc compiles it: ptxas's report, and what instructions it is made of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from importlib import util
from pathlib import Path
from typing import NamedTuple

import building
import pytest

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


class Kernel(NamedTuple):
    """One kernel in the machine code of one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    threads: int  # of a block, as its launch bounds state
    instructions: Counter[str]


@pytest.fixture(scope="module")
def folder(cuda_objects) -> Path:
    found = cuda_objects.result()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """Beside nvcc, or in Triton's package."""
    nvcc, triton = setup.find_nvcc(), util.find_spec("triton")
    folders = [] if nvcc is None else [str(Path(nvcc).parent)]
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    program = shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ["PATH"]]))
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


# --- what the tools print ---------------------------------------------------------------------


def read(object_file: Path, cuobjdump: str) -> list[Kernel]:
    def dump(option: str) -> list[str]:
        command = [cuobjdump, option, str(object_file)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.split("\n")

    report = reported(Path(f"{object_file}.log").read_text())
    threads = launch_bounds(dump("-elf"))
    return [
        Kernel(name, arch, *report[name, arch], threads.get((name, arch), 0), instructions)
        for (name, arch), instructions in disassembled(dump("-sass")).items()
    ]


def reported(log: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, bytes of stack and of spills of each kernel, from ptxas's report."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill"
        r" stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return {
        (name, arch): (int(registers), int(stack), int(stores) + int(loads))
        for name, arch, stack, stores, loads, registers in pattern.findall(log)
    }


def launch_bounds(elf: list[str]) -> dict[tuple[str, str], int]:
    found, arch, name, wanted = {}, "", "", False
    for line in elf:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(".nv.info."):
            name = line.removeprefix(".nv.info.")
        elif "EIATTR_MAX_THREADS" in line:
            wanted = True
        elif wanted and "Value:" in line:
            x, y, z = (int(number, 16) for number in line.split()[1:4])
            found[name, arch], wanted = x * y * z, False
    return found


def disassembled(sass: list[str]) -> dict[tuple[str, str], Counter[str]]:
    """How often each instruction stands in each kernel."""
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    found: dict[tuple[str, str], Counter[str]] = {}
    arch, current = "", Counter[str]()
    for line in sass:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif "Function : " in line:
            current = found.setdefault((line.split()[-1], arch), Counter())
        elif match := instruction.match(line):
            current[match[1]] += 1
    return found


def readable(kernel: Kernel) -> str:
    name = kernel.name
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return f"{kernel.architecture}, {name}"
