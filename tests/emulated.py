"""The CUDA kernels on a CPU: the same sources, compiled with tests/cuda in place of CUDA."""

from __future__ import annotations

import shlex
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

from building import ROOT, alone, load, load_setup, run_ninja

NAME = "_cuda_emulated"
# Fibers jump between stacks, which the checks of _FORTIFY_SOURCE take for an error.
FLAGS = shlex.split(
    "-x c++ -O2 -std=c++17 -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -DPSVIT_EMULATED"
    " -Itests/cuda -Icsrc/cuda"
)


@cache
def module() -> ModuleType | str:
    """The module that takes the place of ``psvit_kernels._cuda``, or what the compiler said."""
    built = load_setup().place_of(NAME)
    with alone(built.parent):
        return run_ninja(built, _parts()) or load(NAME, built)


def _parts():
    setup = load_setup()
    compiler = setup.find_compiler()
    definitions = ["-DPSVIT_EMULATED", f"-DPSVIT_CUDA_MODULE={NAME}"]
    objects = [setup.binding(compiler, setup.CUDA_BINDING, definitions)]
    for path in sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("tests/cuda/*.cpp")]):
        source = path.relative_to(ROOT).as_posix()
        objects.append(setup.Object(path.stem, source, [*compiler, *FLAGS]))
    return setup.Module(objects, setup.link_command(compiler), [])


def run_program(name: str, folder: Path, *sources: str) -> None:
    """Runs ``tests/cuda/host/NAME.cpp`` with other sources; it prints what is wrong."""
    program = folder / name
    sources = (f"tests/cuda/host/{name}.cpp", *sources)
    command = [*load_setup().find_compiler(), *FLAGS, *sources, "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
