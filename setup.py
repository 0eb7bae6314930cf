"""Builds `psvit_kernels._native`; everything else about the package is in pyproject.toml.

The module neither includes nor links PyTorch (it takes pointers, sizes and strides), so one build
serves every supported PyTorch and pip's isolated build environment needs no torch. Each kernel in
csrc/cpu is compiled once per instruction set and the module chooses between them at run time.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
BINDING = "csrc/module.cpp"
COMMON = ["csrc/parallel.cpp"]
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*.cpp"))
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h"))

# No -ffast-math: infinities and NaN must mean what they say. No -fopenmp: the OpenMP runtime that
# PyTorch loaded is found when the module runs, so that there are never two thread pools.
CXX_FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast"
    " -fno-trapping-math -g0 -DNDEBUG -Wall -Wno-psabi -Wno-unknown-pragmas"
)
ISA_PORTABLE = {"portable": []}
ISA_X86 = {
    "avx2": shlex.split("-mavx2 -mfma -mf16c"),
    "avx512": shlex.split(
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
    ),
}


class BuildNative(build_ext):
    """Writes build.ninja and runs ninja, in one folder, so that later builds are incremental."""

    def run(self) -> None:
        if sys.platform == "win32":
            raise PlatformError("psvit builds on Linux and macOS; on Windows, install it in WSL")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        isas = isas_for(compiler)
        tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"native.{tag}"
        built = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        say(f"building {ext.name} for {', '.join(isas)} with {version_of(compiler)}")
        write_ninja_file(folder, built, compiler, isas)
        run_ninja(folder)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # never write into a module that a process has mapped
        shutil.copy2(built, target)
        say(f"built {target.name} ({target.stat().st_size / 1024:.0f} KiB)")


def say(message: str) -> None:
    print(f"psvit: {message}", flush=True)


def find_compiler() -> list[str]:
    """The C++ compiler as the words of a command line: CXX, or the first usual name on PATH."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if not shutil.which(chosen[0]):
            raise PlatformError(f"CXX is {chosen[0]!r}, which is not a program on PATH")
        return chosen
    names = ("c++", "g++", "clang++")
    for name in names:
        if shutil.which(name):
            return [name]
    raise PlatformError(
        f"no C++ compiler found (looked for {', '.join(names)}): install one (Debian, Ubuntu: apt"
        " install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) or set CXX"
    )


def ask(compiler: list[str], option: str) -> str:
    """First line of what the compiler prints for `option`."""
    answer = subprocess.run([*compiler, option], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout:
        command = shlex.join([*compiler, option])
        raise PlatformError(f"the C++ compiler does not run ({command}): {answer.stderr.strip()}")
    return answer.stdout.splitlines()[0]


def version_of(compiler: list[str]) -> str:
    return ask(compiler, "--version")


def isas_for(compiler: list[str]) -> dict[str, list[str]]:
    """Instruction sets to build for, with their flags: by what the compiler targets, since the
    machine that builds may differ from the machine that runs."""
    machine = ask(compiler, "-dumpmachine").split("-")[0]
    return ISA_PORTABLE | (ISA_X86 if machine in ("x86_64", "amd64") else {})


def python_includes() -> list[str]:
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        raise PlatformError(
            f"Python.h is not in {' or '.join(folders)}: install Python's development headers"
            " (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
    return [f"-I{folder}" for folder in folders]


def build_tools():
    """The modules ninja and pybind11, which pip's build isolation provides."""
    try:
        import ninja
        import pybind11
    except ImportError as error:
        raise PlatformError(
            f"{error.name} is missing: without build isolation, first run"
            " `pip install -U setuptools pybind11 ninja`"
        ) from error
    return ninja, pybind11


def binding_flags(isas: dict[str, list[str]]) -> list[str]:
    _, pybind11 = build_tools()
    flags = [f"-I{pybind11.get_include()}", *python_includes()]
    return [*flags, "-DPSVIT_ISA_X86=1"] if "avx2" in isas else flags


def objects(isas: dict[str, list[str]]) -> list[tuple[str, str, list[str]]]:
    """(name, source, flags) of each object file, in link order. The order matters: of an inline
    function that several objects define the linker keeps the first, and code that every processor
    runs must not end up with a copy made for AVX-512."""
    listed = [("module", BINDING, binding_flags(isas))]
    listed += [(Path(source).stem, source, []) for source in COMMON]
    for isa, flags in isas.items():
        for source in KERNELS:
            name = f"{Path(source).stem}.{isa}"
            listed.append((name, source, [*flags, f"-DPSVIT_ISA={isa}"]))
    return listed


def link_flags() -> tuple[list[str], list[str]]:
    """Flags before the objects, and libraries after them."""
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"], []
    return ["-shared"], ["-ldl"]


def from_environment(*names: str) -> list[str]:
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


def write_ninja_file(
    folder: Path, built: Path, compiler: list[str], isas: dict[str, list[str]]
) -> None:
    ninja, _ = build_tools()

    def words(command: list[str]) -> str:
        return ninja.escape(shlex.join(command))

    before, libraries = link_flags()
    user = from_environment("CFLAGS", "CXXFLAGS")
    here = Path(os.path.relpath(folder, ROOT))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.ninja", "w", encoding="utf-8") as file:
        out = ninja.Writer(file, width=1000)
        out.variable("builddir", here.as_posix())  # where ninja keeps its log
        out.variable("cxx", words(compiler))
        out.variable("cxxflags", words([*CXX_FLAGS, *user]))
        out.variable("ldflags", words([*before, *user, *from_environment("LDFLAGS")]))
        out.variable("libs", words(libraries))
        out.rule(
            "compile",
            command="$cxx $cxxflags $flags -MD -MF $out.d -c $in -o $out",
            description="compile $out",
            depfile="$out.d",
            deps="gcc",
        )
        out.rule("link", command="$cxx $ldflags $in -o $out $libs", description="link $out")
        made = []
        for name, source, flags in objects(isas):
            made.append((here / f"{name}.o").as_posix())
            out.build(made[-1], "compile", source, variables={"flags": words(flags)})
        out.build((here / built.name).as_posix(), "link", made)


def run_ninja(folder: Path) -> None:
    ninja, _ = build_tools()
    program = shutil.which("ninja", path=os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]]))
    if program is None:
        raise PlatformError("the program ninja is not on PATH: run `pip install ninja`")
    command = [program, "-f", str(folder / "build.ninja")]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise CompileError("psvit_kernels._native did not compile: see the messages above")


setup(
    ext_modules=[Extension("psvit_kernels._native", [BINDING, *COMMON, *KERNELS], depends=HEADERS)],
    cmdclass={"build_ext": BuildNative},
)
