"""What nvcc makes of the CUDA kernels: registers, spills, instructions.

``python tests/machine_code.py FILE`` compiles csrc/cuda and writes it as JSON: what the figures in
csrc/cuda/NOTES.md and bench/results/cuda-kernels.json are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import building


class Kernel(NamedTuple):
    """One kernel in the machine code of one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    threads: int  # of a block, as its launch bounds state
    instructions: Counter[str]
    loops: list[int]  # instructions of each loop that has a product of the tensor cores


def find_cuobjdump() -> str | None:
    """Beside nvcc, on PATH, or in Triton's package."""
    nvcc, triton = building.load_setup().find_nvcc(), util.find_spec("triton")
    folders = [] if nvcc is None else [str(Path(nvcc).parent)]
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ["PATH"]]))


def read(object_file: Path, cuobjdump: str) -> list[Kernel]:
    def dump(option: str) -> list[str]:
        command = [cuobjdump, option, str(object_file)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.split("\n")

    report = reported(Path(f"{object_file}.log").read_text())
    threads = launch_bounds(dump("-elf"))
    return [
        Kernel(
            name, arch, *report[name, arch], threads.get((name, arch), 0),
            Counter(text for _, text, _ in code), product_loops(code),
        )
        for (name, arch), code in disassembled(dump("-sass")).items()
    ]  # fmt: skip


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


#: Address, name, and where it branches to, if it does.
Instruction = tuple[int, str, "int | None"]


def disassembled(sass: list[str]) -> dict[tuple[str, str], list[Instruction]]:
    pattern = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
    found: dict[tuple[str, str], list[Instruction]] = {}
    arch, current = "", []
    for line in sass:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif "Function : " in line:
            current = found.setdefault((line.split()[-1], arch), [])
        elif match := pattern.match(line):
            target = re.search("0x([0-9a-f]+)", match[3]) if match[2].startswith("BRA") else None
            place = None if target is None else int(target[1], 16)
            current.append((int(match[1], 16), match[2], place))
    return found


def product_loops(code: list[Instruction]) -> list[int]:
    """Lengths of the loops around products, the shortest first."""
    found = []
    for end, _, start in code:
        if start is None or start > end:
            continue
        inside = [name for address, name, _ in code if start <= address <= end]
        if any(name.startswith(("HGMMA", "HMMA")) for name in inside):
            found.append(len(inside))
    return sorted(found)


def readable(kernel: Kernel) -> str:
    name = kernel.name
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return f"{kernel.architecture}, {name}"


def main(output: Path) -> None:
    folder, program = building.compile_cuda(), find_cuobjdump()
    if isinstance(folder, str) or program is None:
        sys.exit(f"machine_code: {folder if program else 'no cuobjdump'}")
    setup = building.load_setup()
    table: list[dict[str, Any]] = []
    for source in sorted(setup.CUDA_KERNELS):
        for kernel in read(folder / f"{Path(source).stem}.o", program):
            size = {"instructions": kernel.instructions.total(), "name": readable(kernel)}
            table.append({**kernel._asdict(), **size, "source": source})
    version = setup.nvcc_version(setup.find_nvcc())
    output.write_text(json.dumps({"nvcc": version, "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
