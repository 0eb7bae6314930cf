"""What setup.py decides: whether the CUDA module is built, by which nvcc, for which GPUs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import building
import pytest

if (reason := building.unavailable()) is not None:
    pytest.skip(f"nothing can be built here: {reason}", allow_module_level=True)

from setuptools import Distribution

setup = building.load_setup()
linux = pytest.mark.skipif(sys.platform == "darwin", reason="no CUDA on macOS")

VERSION = "Cuda compilation tools, release {}, V0"
LIBRARIES = '#$ LIBRARIES=  "-L/there/stubs" "-L/the re"'


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in ("PSVIT_CUDA", "PSVIT_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nvcc(tmp_path):
    """Puts an nvcc of a version into a folder as CUDA_HOME has it."""

    def make(version: str = "12.8", name: str = "cuda") -> Path:
        path = tmp_path / name / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(
            "#!/bin/sh\ncase $1 in\n"
            f"--version) echo '{VERSION.format(version)}' ;;\n"
            "--list-gpu-arch) echo compute_80; echo compute_90 ;;\n"
            f"--dryrun) echo '{LIBRARIES}' >&2 ;;\n"
            "*) exit 1 ;;\nesac\n"
        )
        path.chmod(0o755)
        return path

    return make


def use(monkeypatch, path: Path) -> None:
    monkeypatch.setattr(setup, "find_nvcc", lambda: str(path))


def refusal(call) -> str:
    with pytest.raises(SystemExit) as caught:
        call()
    return str(caught.value)


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value, wanted", [(None, None), ("", None), ("0", False), ("1", True)])
def test_psvit_cuda_says_whether_it_is_wanted(monkeypatch, value, wanted):
    if value is not None:
        monkeypatch.setenv("PSVIT_CUDA", value)
    assert setup.cuda_wanted() is wanted


@pytest.mark.parametrize("value", ["yes", "2", " 1"])
def test_other_values_are_an_error(monkeypatch, value):
    monkeypatch.setenv("PSVIT_CUDA", value)
    assert refusal(setup.cuda_wanted) == (
        f'psvit: PSVIT_CUDA: got "{value}", expected 1 (build the CUDA kernels or fail) or 0 '
        "(leave them out)"
    )


@pytest.mark.parametrize(
    "value, archs",
    [
        ("", ["80", "90a"]),
        ("80", ["80"]),
        ("80,90a", ["80", "90a"]),
        ("86 100", ["86", "100"]),
        (" 89, 90 ", ["89", "90"]),
    ],
)
def test_architectures_are_listed_with_commas_or_spaces(monkeypatch, value, archs):
    monkeypatch.setenv("PSVIT_CUDA_ARCHS", value)
    assert setup.cuda_archs() == archs


@pytest.mark.parametrize("value", ["8.0", "sm_80", "75", "80;90", "100a", "80,native"])
def test_wrong_architectures_are_an_error(monkeypatch, value):
    monkeypatch.setenv("PSVIT_CUDA_ARCHS", value)
    assert refusal(setup.cuda_archs) == (
        f'psvit: PSVIT_CUDA_ARCHS: got "{value}", expected architectures from 80 on, as nvcc '
        'numbers them, such as "80,90a"'
    )


def test_hopper_kernels_are_for_hopper_alone_and_the_others_for_all():
    def gencode(source: str, *archs: str) -> list[str]:
        return [f.removeprefix("-gencode=arch=") for f in setup.gencode_flags(source, list(archs))]

    assert gencode("a_hopper.cu", "80", "90a") == ["compute_90a,code=sm_90a"]
    assert gencode("a_hopper.cu", "80", "90") == []
    assert gencode("a.cu", "90a", "80") == [
        "compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90",
    ]  # fmt: skip
    assert gencode("a.cu", "100", "89") == [
        "compute_89,code=sm_89", "compute_100,code=sm_100", "compute_100,code=compute_100",
    ]  # fmt: skip
    assert setup.compiled_for(["80", "90a"]) == "sm_80, sm_90, sm_90a, PTX of compute_90"


# --- the compiler -----------------------------------------------------------------------------


def test_nvcc_is_looked_for_where_people_put_it(monkeypatch, nvcc):
    home, path, on_path = (nvcc(name=name) for name in ("home", "path", "on_path"))
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert setup.find_nvcc() == str(on_path)
    monkeypatch.setenv("CUDA_PATH", str(path.parent.parent))
    assert setup.find_nvcc() == str(path)
    monkeypatch.setenv("CUDA_HOME", str(home.parent.parent))
    assert setup.find_nvcc() == str(home)
    monkeypatch.setenv("CUDA_HOME", os.devnull)
    assert setup.find_nvcc() == str(path)


@pytest.mark.parametrize("version, known", [("12.5", True), ("13.2", True), ("12.4", False)])
def test_nvcc_must_be_new_enough(nvcc, version, known):
    path = nvcc(version)
    if known:
        assert setup.nvcc_version(str(path)) == version
    else:
        with pytest.raises(setup.PlatformError) as caught:
            setup.nvcc_version(str(path))
        assert str(caught.value) == f"{path} is release 12.4, expected 12.5 or newer"


def test_architectures_that_nvcc_does_not_know_are_an_error(monkeypatch, nvcc):
    monkeypatch.setenv("PSVIT_CUDA_ARCHS", "80,130")
    assert refusal(lambda: setup.check_archs(str(nvcc()), setup.cuda_archs())) == (
        'psvit: PSVIT_CUDA_ARCHS: got "80,130", expected those that this nvcc knows: 80, 90'
    )


def test_cudart_is_where_nvcc_would_look_for_it(nvcc):
    assert setup.nvcc_libraries(str(nvcc())) == ["-L/there/stubs", "-L/the re"]


def test_a_cache_in_front_of_the_compiler_is_not_for_nvcc():
    assert setup.host_compiler(["/usr/bin/ccache", "g++-12", "-m64"]) == "g++-12"


# --- the module -------------------------------------------------------------------------------


@linux
def test_without_nvcc_the_module_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert setup.cuda_module() is None
    assert capsys.readouterr().out == "psvit: no nvcc: the CUDA kernels are left out\n"
    monkeypatch.setenv("PSVIT_CUDA", "1")
    with pytest.raises(setup.PlatformError, match="PSVIT_CUDA=1, but no nvcc in CUDA_HOME"):
        setup.cuda_module()


def test_it_is_left_out_when_told_so(monkeypatch, nvcc):
    use(monkeypatch, nvcc())
    monkeypatch.setenv("PSVIT_CUDA", "0")
    assert setup.cuda_module() is None


@linux
def test_it_is_built_where_there_is_nvcc(monkeypatch, nvcc):
    path = nvcc()
    use(monkeypatch, path)
    module = setup.cuda_module()
    names = [Path(source).stem for source in setup.CUDA_KERNELS]
    assert [o.name for o in module.objects] == ["module", *names]
    assert all(o.command[0] == str(path) for o in module.objects[1:])
    assert "-lcudart_static" in module.libraries
    monkeypatch.setenv("PSVIT_CUDA_ARCHS", "80")
    names = [name for name in names if not name.endswith("_hopper")]
    assert [o.name for o in setup.cuda_module().objects] == ["module", *names]


@linux
@pytest.mark.parametrize("optional", [True, False])
def test_a_module_that_does_not_compile_is_left_out_loudly_unless_it_was_asked_for(
    monkeypatch, nvcc, capsys, tmp_path, optional
):
    use(monkeypatch, nvcc("11.8"))
    extension = setup.Extension("psvit_kernels._cuda", [], optional=optional)
    command = setup.BuildModules(Distribution({"ext_modules": [extension]}))
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    stale = Path(command.get_ext_fullpath(extension.name))
    stale.parent.mkdir()
    stale.touch()
    if optional:
        command.build_extension(extension)
        said = capsys.readouterr().out
        assert "is release 11.8, expected 12.5 or newer" in said
        assert "psvit_kernels._cuda IS LEFT OUT for the reason above" in said
    else:
        with pytest.raises(setup.PlatformError, match=r"is release 11\.8, expected 12\.5 or newer"):
            command.build_extension(extension)
    assert not stale.exists()
