"""Compiles csrc as setup.py does, for tests: at their first use, and again what has changed."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def load_setup() -> ModuleType:
    """setup.py as a module: how the package is built is written there alone."""
    return load("psvit_setup", ROOT / "setup.py")


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
        setup.python_includes()
    except setup.PlatformError as error:
        return str(error)
    return None


@contextmanager
def alone(folder: Path):
    """Another session waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_ninja(built: Path, module, *targets: str) -> str | None:
    """Builds a ``setup.Module``, or some of its objects; what the compiler said if it failed."""
    setup = load_setup()
    setup.write_ninja_file(built, module)
    command = [*setup.ninja_command(built), *targets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout[-6000:] + done.stderr if done.returncode else None


def compile_cuda() -> Path | str:
    """The folder with the object of every file of csrc/cuda, or why there is none."""
    setup = load_setup()
    try:
        module = setup.cuda_module()
    except setup.PlatformError as error:
        return str(error)
    if module is None:
        return "no nvcc, or PSVIT_CUDA=0"
    built = setup.place_of("_cuda")
    kernels = [f"{built.parent.relative_to(ROOT)}/{o.name}.o" for o in module.objects[1:]]
    with alone(built.parent):
        trouble = run_ninja(built, module, *kernels)
    assert trouble is None, trouble
    return built.parent
