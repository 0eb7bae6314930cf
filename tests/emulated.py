"""The CUDA kernels on a CPU: the same sources, compiled with tests/cuda in place of CUDA.

Built at the first use, into ``build/``; what has not changed since is not compiled again.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shlex
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
NAME = "_cuda_emulated"
# Fibers jump between stacks, which the checks of _FORTIFY_SOURCE take for an error.
FLAGS = shlex.split(
    "-x c++ -O2 -std=c++17 -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -DPSVIT_EMULATED"
    " -Itests/cuda -Icsrc/cuda"
)


@cache
def load_setup() -> ModuleType:
    """setup.py as a module: how the package is built is written there alone."""
    return _load("psvit_setup", ROOT / "setup.py")


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        setup = load_setup()
    except ImportError as error:
        return f"{error.name} is not installed"
    try:
        setup.build_tools()
        setup.find_compiler()
    except setup.PlatformError as error:
        return str(error)
    return None


@cache
def module() -> ModuleType | str:
    """The module that takes the place of ``psvit_kernels._cuda``, or what the compiler said."""
    setup = load_setup()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = ROOT / "build" / f"emulated{suffix.removesuffix('.so')}" / f"{NAME}{suffix}"
    built.parent.mkdir(parents=True, exist_ok=True)
    with open(built.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another session may be at it too
        setup.write_ninja_file(built, _parts(setup))
        command = setup.ninja_command(built)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout[-6000:] if done.returncode else _load(NAME, built)


def _parts(setup: ModuleType):
    compiler = setup.find_compiler()
    definitions = ["-DPSVIT_EMULATED", f"-DPSVIT_CUDA_MODULE={NAME}"]
    objects = [setup.binding(compiler, setup.CUDA_BINDING, definitions)]
    for path in sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("tests/cuda/*.cpp")]):
        source = path.relative_to(ROOT).as_posix()
        objects.append(setup.Object(path.stem, source, [*compiler, *FLAGS]))
    return setup.Module(objects, setup.link_command(compiler), [])
