"""Builds the compiled modules of psvit_kernels; everything else is in pyproject.toml.

Neither includes or links PyTorch (they take pointers, sizes and strides), so one build serves every
supported PyTorch and pip's isolated build environment needs no torch.

- `_native`, always: each kernel in csrc/cpu is compiled once per instruction set, and the module
  chooses between them at run time.
- `_cuda`, where nvcc is found. PSVIT_CUDA=1 makes it an error if it can't be built, PSVIT_CUDA=0
  leaves it out; PSVIT_CUDA_ARCHS says for which architectures (nvcc's names: "80,90a").
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
BINDING = "csrc/module.cpp"
COMMON = ["csrc/parallel.cpp"]
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*.cpp"))
CUDA_BINDING = "csrc/cuda/module.cpp"
CUDA_KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu"))
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

#: Every GPU from compute capability 8.0 on, those after 9.0 by its PTX; and Hopper's own kernels.
DEFAULT_ARCHS = "80,90a"
OLDEST_ARCH = 80
OLDEST_NVCC = (12, 5)  # the first with cudaGetDriverEntryPointByVersion
NVCC_FLAGS = shlex.split(
    "-O3 -std=c++17 -DNDEBUG -Xcompiler=-fPIC,-fvisibility=hidden,-g0 -Xptxas=-v"
)


class Object(NamedTuple):
    """An object file, and the command that makes it from its source."""

    name: str
    source: str
    command: list[str]


class Module(NamedTuple):
    """In link order; the libraries come after the objects."""

    objects: list[Object]
    link: list[str]
    libraries: list[str]


class BuildModules(build_ext):
    """Writes build.ninja and runs ninja, in a folder of its own for each module, so that later
    builds are incremental."""

    def run(self) -> None:
        if sys.platform == "win32":
            raise PlatformError("psvit builds on Linux and macOS; on Windows, install it in WSL")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_module(ext)
        except (CompileError, PlatformError) as error:
            if not ext.optional:
                raise
            say(f"{error}")
            say(
                f"{ext.name} IS LEFT OUT for the reason above; all else is installed. PSVIT_CUDA=1"
                " makes this an error, PSVIT_CUDA=0 doesn't try"
            )

    def build_module(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # never write into a module that a process has mapped
        wanted = native_module() if name == "_native" else cuda_module()
        if wanted is None:
            return
        built = place_of(name)
        write_ninja_file(built, wanted)
        run_ninja(built)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)
        say(f"built {target.name} ({target.stat().st_size / 1024:.0f} KiB)")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # what this build leaves out must not stay from an earlier one
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def say(message: str) -> None:
    print(f"psvit: {message}", flush=True)


def wrong(setting: str, expected: str) -> SystemExit:
    """For what a person asked for: an error even where the module itself is optional."""
    return SystemExit(f'psvit: {setting}: got "{os.environ[setting]}", expected {expected}')


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


def link_flags() -> tuple[list[str], list[str]]:
    """Flags before the objects, and libraries after them."""
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"], []
    return ["-shared"], ["-ldl"]


def from_environment(*names: str) -> list[str]:
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


def cxx_command(compiler: list[str]) -> list[str]:
    return [*compiler, *CXX_FLAGS, *from_environment("CFLAGS", "CXXFLAGS")]


def link_command(compiler: list[str]) -> list[str]:
    before, _ = link_flags()
    return [*compiler, *before, *from_environment("CFLAGS", "CXXFLAGS", "LDFLAGS")]


def binding(compiler: list[str], source: str, definitions: list[str]) -> Object:
    _, pybind11 = build_tools()
    includes = [f"-I{pybind11.get_include()}", *python_includes()]
    return Object("module", source, [*cxx_command(compiler), *includes, *definitions])


# --- _native ----------------------------------------------------------------------------------


def native_module() -> Module:
    """The order of the objects matters: of an inline function that several define the linker keeps
    the first, and code that every processor runs must not end up with a copy made for AVX-512."""
    compiler = find_compiler()
    isas = isas_for(compiler)
    say(f"building _native for {', '.join(isas)} with {version_of(compiler)}")
    cxx = cxx_command(compiler)
    objects = [binding(compiler, BINDING, ["-DPSVIT_ISA_X86=1"] if "avx2" in isas else [])]
    objects += [Object(Path(source).stem, source, cxx) for source in COMMON]
    for isa, flags in isas.items():
        for source in KERNELS:
            name = f"{Path(source).stem}.{isa}"
            objects.append(Object(name, source, [*cxx, *flags, f"-DPSVIT_ISA={isa}"]))
    return Module(objects, link_command(compiler), link_flags()[1])


# --- _cuda ------------------------------------------------------------------------------------


def cuda_wanted() -> bool | None:
    """PSVIT_CUDA: True, False, or None where it is for nvcc to decide."""
    setting = os.environ.get("PSVIT_CUDA", "")
    if setting not in ("", "0", "1"):
        raise wrong("PSVIT_CUDA", "1 (build the CUDA kernels or fail) or 0 (leave them out)")
    return setting == "1" if setting else None


def cuda_archs() -> list[str]:
    """PSVIT_CUDA_ARCHS, as nvcc names them."""
    archs = (os.environ.get("PSVIT_CUDA_ARCHS") or DEFAULT_ARCHS).replace(",", " ").split()
    for arch in archs:
        number = arch.removesuffix("a") if arch == "90a" else arch
        if not number.isdecimal() or int(number) < OLDEST_ARCH:
            raise wrong(
                "PSVIT_CUDA_ARCHS",
                f'architectures from {OLDEST_ARCH} on, as nvcc numbers them, such as "80,90a"',
            )
    return archs


def cuda_module() -> Module | None:
    wanted = cuda_wanted()
    if wanted is False or sys.platform == "darwin":
        return None
    compiler, nvcc = find_compiler(), find_nvcc()
    if nvcc is None:
        if wanted:
            raise PlatformError(
                "PSVIT_CUDA=1, but no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
            )
        say("no nvcc: the CUDA kernels are left out")
        return None
    archs, version = cuda_archs(), nvcc_version(nvcc)
    check_archs(nvcc, archs)
    say(f"building _cuda for {', '.join(archs)} with nvcc {version}")
    return Module(
        cuda_objects(compiler, nvcc, archs),
        # cudart's own names stay inside: PyTorch has loaded another.
        [*link_command(compiler), "-Wl,--exclude-libs,ALL"],
        [*nvcc_libraries(nvcc), "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
    )


def find_nvcc() -> str | None:
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    folders = [os.path.join(home, "bin") for home in homes if home]
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def ask_nvcc(nvcc: str, *options: str) -> str:
    answer = subprocess.run([nvcc, *options], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        command = shlex.join([nvcc, *options])
        raise PlatformError(f"nvcc does not run ({command}): {answer.stderr.strip()}")
    return answer.stdout + answer.stderr


def nvcc_version(nvcc: str) -> str:
    found = re.search(r"release (\d+)\.(\d+)", ask_nvcc(nvcc, "--version"))
    if found is None or (int(found[1]), int(found[2])) < OLDEST_NVCC:
        version = found[0] if found else "of no version"
        raise PlatformError(
            f"{nvcc} is {version}, expected {'.'.join(map(str, OLDEST_NVCC))} or newer"
        )
    return f"{found[1]}.{found[2]}"


def check_archs(nvcc: str, archs: list[str]) -> None:
    known = re.findall(r"compute_(\d+)", ask_nvcc(nvcc, "--list-gpu-arch"))
    if not {arch.removesuffix("a") for arch in archs} <= set(known):
        raise wrong("PSVIT_CUDA_ARCHS", f"those that this nvcc knows: {', '.join(known)}")


def nvcc_libraries(nvcc: str) -> list[str]:
    """Where cudart is, as nvcc itself would tell the linker."""
    told = ask_nvcc(nvcc, "--dryrun", "-x", "cu", os.devnull)
    found = re.search(r"^#\$ LIBRARIES=(.*)$", told, re.MULTILINE)
    return shlex.split(found[1]) if found else []


def host_compiler(compiler: list[str]) -> str:
    """The one that nvcc is to call: a program, without what caches its results."""
    return next(word for word in compiler if Path(word).name not in ("ccache", "sccache", "distcc"))


def cuda_objects(compiler: list[str], nvcc: str, archs: list[str]) -> list[Object]:
    objects = [binding(compiler, CUDA_BINDING, [f'-DPSVIT_CUDA_ARCHS="{compiled_for(archs)}"'])]
    command = [nvcc, "-ccbin", host_compiler(compiler), *NVCC_FLAGS]
    for source in CUDA_KERNELS:
        if gencode := gencode_flags(source, archs):
            objects.append(Object(Path(source).stem, source, [*command, *gencode]))
    return objects


def numbers(archs: list[str]) -> list[str]:
    return sorted({arch.removesuffix("a") for arch in archs}, key=int)


def compiled_for(archs: list[str]) -> str:
    """In words, for `psvit info`."""
    plain = numbers(archs)
    hopper = ["sm_90a"] if "90a" in archs else []
    return ", ".join([*(f"sm_{n}" for n in plain), *hopper, f"PTX of compute_{plain[-1]}"])


def gencode_flags(source: str, archs: list[str]) -> list[str]:
    """Hopper's own kernels for sm_90a alone, or not at all; the others for each architecture, and
    as PTX for those to come."""
    if source.endswith("_hopper.cu"):
        return ["-gencode=arch=compute_90a,code=sm_90a"] if "90a" in archs else []
    plain = numbers(archs)
    binaries = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in plain]
    return [*binaries, f"-gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}"]


# --- ninja ------------------------------------------------------------------------------------


def place_of(name: str) -> Path:
    """Where a module is built, before it is copied to where it belongs."""
    folder = f"{name.strip('_')}.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return ROOT / "build" / folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def write_ninja_file(built: Path, module: Module) -> None:
    """build.ninja beside the module that it builds; paths in it are relative to the sources."""
    ninja, _ = build_tools()

    def words(command: list[str]) -> str:
        return ninja.escape(shlex.join(command))

    here = Path(os.path.relpath(built.parent, ROOT))
    built.parent.mkdir(parents=True, exist_ok=True)
    with open(built.parent / "build.ninja", "w", encoding="utf-8") as file:
        out = ninja.Writer(file, width=1000)
        out.variable("builddir", here.as_posix())  # where ninja keeps its log
        out.variable("link", words(module.link))
        out.variable("libs", words(module.libraries))
        out.rule(
            "compile",
            command="$compile -MD -MF $out.d -c $in -o $out",
            description="compile $out",
            depfile="$out.d",
            deps="gcc",
        )
        out.rule(
            "compile-cuda",  # what the compiler says of registers stays beside the object
            command="$compile -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
            " || { cat $out.log; exit 1; }",
            description="compile $out",
            depfile="$out.d",
            deps="gcc",
        )
        out.rule("link", command="$link $in -o $out $libs", description="link $out")
        made = []
        for name, source, command in module.objects:
            made.append((here / f"{name}.o").as_posix())
            rule = "compile-cuda" if source.endswith(".cu") else "compile"
            out.build(made[-1], rule, source, variables={"compile": words(command)})
        out.build((here / built.name).as_posix(), "link", made)


def ninja_command(built: Path) -> list[str]:
    ninja, _ = build_tools()
    program = shutil.which("ninja", path=os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]]))
    if program is None:
        raise PlatformError("the program ninja is not on PATH: run `pip install ninja`")
    command = [program, "-f", str(built.parent / "build.ninja")]
    jobs = os.environ.get("MAX_JOBS")
    return [*command, "-j", jobs] if jobs else command


def run_ninja(built: Path) -> None:
    if subprocess.run(ninja_command(built), cwd=ROOT, check=False).returncode != 0:
        raise CompileError(f"{built.name} did not compile: see the messages above")


if __name__ == "__main__":
    cuda_archs()
    setup(
        ext_modules=[
            Extension("psvit_kernels._native", [BINDING, *COMMON, *KERNELS], depends=HEADERS),
            Extension(
                "psvit_kernels._cuda",
                [CUDA_BINDING, *CUDA_KERNELS],
                depends=HEADERS,
                optional=cuda_wanted() is not True,
            ),
        ],
        cmdclass={"build_ext": BuildModules},
    )
