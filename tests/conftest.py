"""What every test starts from: its own random inputs, NaN in fresh memory, no forced provider."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import deterministic

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite(
    "accuracy", "attention_cases", "hosts", "pool_cases", "training_runs"
)

import building  # noqa: E402
import hosts  # noqa: E402
from forced_providers import (  # noqa: E402
    BACKENDS,
    CUDA_DEVICE,
    cuda_kernels,
    serving,
    unavailable,
)
from inputs import F16  # noqa: E402
from surroundings import MEASURED, threads  # noqa: E402

from psvit_kernels import probe, registry, storage  # noqa: E402
from psvit_kernels.triton import interpreting  # noqa: E402

#: Another number gives every test other random inputs.
SEED = int(os.environ.get("PSVIT_TEST_SEED", "0"))

REFUSED = 'provider "cuda" was forced but cannot serve'


def pytest_report_header() -> str:
    served = {name: unavailable(name) or "available" for name in registry.PROVIDERS}
    if CUDA_DEVICE == "cpu":
        served["cuda"] = "emulated on the CPU"
    return f"psvit: PSVIT_TEST_SEED={SEED}, providers: {served}"


@pytest.fixture(scope="session", autouse=True)
def interpreter_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """For each run that ``test_triton_interpreter.py`` waits for, its process and its output."""
    here, running = Path(__file__).parent, {}
    for item in request.session.items:
        if item.path.name != "test_triton_interpreter.py":
            continue
        files = item.callspec.params["files"]
        log = tmp_path_factory.mktemp("interpreter") / "log"
        command = [str(Path(sys.executable).with_name("pytest")), "-p", "no:cacheprovider"]
        command += ["-k", "triton", *(str(here / name) for name in files.split())]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=here, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, "TRITON_INTERPRET": "1"},
            )  # fmt: skip
        running[files] = process, log
    yield running
    for process, _ in running.values():
        process.kill()


@pytest.fixture(scope="session", autouse=True)
def cuda_objects(request: pytest.FixtureRequest):
    """What ``test_cuda_compiles.py`` looks at: begun with the session's first test, as above."""
    if all(item.path.name != "test_cuda_compiles.py" for item in request.session.items):
        yield None
        return
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(building.compile_cuda)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """What the CUDA kernels refuse is skipped; ``test_cuda_provider.py`` has what they must not."""
    try:
        return (yield)
    except ValueError as error:
        reason = str(error)
        if not {"backend", "kernel"} & {*pyfuncitem.fixturenames} or REFUSED not in reason:
            raise
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def own_random_inputs(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) ^ SEED)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch):
    """torch.empty, empty_like and new_empty start as NaN: what an operation forgets to write shows.

    PyTorch does this itself in its deterministic mode; ``warn_only`` keeps everything else alive.
    """
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def provider_left_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_forced", registry.forced())


@pytest.fixture
def one_thread():
    """For models so small that threads would only wait for each other."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def model():
    """A small ViT of timm, the same in each file that plans with it or distils it."""
    torch.manual_seed(0)
    return hosts.timm_vit()


@pytest.fixture(scope="module")
def images():
    """What that model is fitted to and looked at with."""
    return torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[name for name in registry.PROVIDERS if name != "cuda"])
def provider(request: pytest.FixtureRequest):
    """The test runs once for each provider of float32, forced, so that nothing falls back."""
    with serving(request.param):
        yield request.param


@pytest.fixture
def cpu_provider():
    with serving("cpu"):
        yield "cpu"


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest):
    """Each provider with each dtype that it serves."""
    with serving(request.param.provider, request.param.dtype, request.param.family):
        yield request.param


#: In the interpreter, which is slow, sweeps of sizes are for one dtype.
SWEPT = [b for b in BACKENDS if b.provider != "reference"]
SWEPT = [b for b in SWEPT if not (interpreting() and b.dtype == F16)]


@pytest.fixture(params=SWEPT, ids=str)
def kernel(request: pytest.FixtureRequest):
    """Each provider but the reference, for sweeps: the reference is made of PyTorch's own parts."""
    with serving(request.param.provider, request.param.dtype, request.param.family):
        yield request.param


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, in a process that knows no rates and isn't deterministic."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "_known", {})
    storage.warn_once.cache_clear()
    torch.use_deterministic_algorithms(False)  # conftest sets it again
    return tmp_path


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices that were measured; each gives the same rates at once."""
    devices: list[torch.device] = []

    def measure(device: torch.device) -> dict[str, float]:
        devices.append(device)
        return dict(MEASURED)

    monkeypatch.setattr(probe, "_measure", measure)
    return devices


@pytest.fixture
def store(tmp_path: Path):
    """Where a session of the GPU runner keeps its results."""
    from bench.gpu import session  # whose path the tests that ask for it have added

    return session.Store(tmp_path / "results")


@pytest.fixture
def kernels():
    """The CUDA provider as it is, which refuses gradients; skips where a GPU is no Hopper."""
    with cuda_kernels("sm_90a", gradients=False):
        yield
