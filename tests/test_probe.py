"""The rates of a machine: measured once, kept, and never where nothing may be measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time
import warnings
from importlib import util
from pathlib import Path

import pytest
import torch
from inputs import BF16
from surroundings import MEASURED

import psvit_kernels as pk
from psvit_kernels import choice, info, probe, storage
from psvit_kernels.probe import Rates

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
needs_triton = pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is missing")


# --- rates --------------------------------------------------------------------------------------


def test_measures_a_cpu_once_and_keeps_it(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_WARM_UP", 0.0)
    monkeypatch.setattr(probe, "_SECONDS", 0.01)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=BF16):
        found = probe.rates("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(1e6 < getattr(found, name) < 1e16 for name in MEASURED)
    assert found.memory > 1e8
    assert found.origin.startswith("measured just now")
    (entry,) = json.loads((cache_folder / "psvit" / "rates.json").read_text()).values()
    assert entry == {name: getattr(found, name) for name in MEASURED}
    assert probe.rates("cpu") is found
    probe._known.clear()
    again = probe.rates("cpu")
    assert again[:-1] == found[:-1] and again.origin.startswith("measured earlier")


def test_other_threads_are_another_machine(cache_folder: Path, probed: list) -> None:
    before = torch.get_num_threads()
    probe.rates("cpu")
    try:
        torch.set_num_threads(before + 1)
        probe.rates("cpu")
    finally:
        torch.set_num_threads(before)
    probe.rates("cpu")
    assert probed == [CPU, CPU]
    assert len(json.loads(storage.file_of("rates").read_text())) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"%s": null}',
        b'{"%s": {"copy": 1.0}}',
        b'{"%s": {"copy": "1", "exp": 1, "float32": 1, "bfloat16": 1, "float16": 1}}',
        b'{"%s": {"copy": 0, "exp": 1, "float32": 1, "bfloat16": 1, "float16": 1}}',
        b'{"%s": {"copy": NaN, "exp": 1, "float32": 1, "bfloat16": 1, "float16": 1}}',
        b'{"%s": {"copy": 1e999, "exp": 1, "float32": 1, "bfloat16": 1, "float16": 1}}',
    ],
)
@pytest.mark.filterwarnings("ignore:psvit_kernels. kept rates could not be read")
def test_a_corrupt_cache_is_measured_again(cache_folder, probed, content: bytes) -> None:
    path = storage.file_of("rates")
    path.parent.mkdir()
    path.write_bytes(content.replace(b"%s", probe.device_key(CPU).encode()))
    assert probe.rates("cpu").copy == MEASURED["copy"] and probed == [CPU]
    assert json.loads(path.read_text())[probe.device_key(CPU)] == MEASURED


def test_a_corrupt_cache_is_one_warning(cache_folder: Path, probed: list) -> None:
    path = storage.file_of("rates")
    path.parent.mkdir()
    path.write_text("{")
    with pytest.warns(UserWarning, match="kept rates could not be read") as caught:
        probe.rates("cpu")
    assert len(caught) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(cache_folder: Path, probed: list) -> None:
    cache_folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="could not be kept") as caught:
        assert probe.rates("cpu").copy == MEASURED["copy"]
    cache_folder.chmod(stat.S_IRWXU)
    assert len(caught) == 1


def test_a_cache_that_cannot_be_written_is_one_warning(
    cache_folder: Path, probed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache_folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder / "file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert probe.rates("cpu").copy == probe.rates("cpu").copy == MEASURED["copy"]
    assert ["could not be kept" in str(w.message) for w in caught] in ([True], [False, True])
    assert probed == [CPU]


def test_nothing_is_left_behind_where_renaming_fails(cache_folder: Path, probed: list) -> None:
    storage.file_of("rates").mkdir(parents=True)  # a folder where the file should be
    with pytest.warns(UserWarning, match="could not be"):
        probe.rates("cpu")
    assert [path.name for path in (cache_folder / "psvit").iterdir()] == ["rates.json"]


def test_no_home_is_no_error(
    cache_folder: Path, probed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="could not be"):
        assert probe.rates("cpu").copy == MEASURED["copy"]


@pytest.mark.parametrize(
    ("system", "folder"),
    [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")],
)
def test_where_rates_are_kept(
    system: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification wants ignored
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", system)
    assert storage.file_of("rates") == tmp_path / folder / "psvit" / "rates.json"


def _keep_many(folder: str, name: str) -> None:
    os.environ["XDG_CACHE_HOME"] = folder
    for i in range(100):
        storage.keep("rates", f"{name}{i % 2}", MEASURED)


def test_two_processes_write_at_once(cache_folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_keep_many, args=(str(cache_folder), name)) for name in ("a", "b")
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        time.sleep(0.01)
        content = storage.read("rates")  # a warning, if half of a file is seen, fails the test
        assert all(entry == MEASURED for entry in content.values())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert storage.read("rates")
    assert [path.name for path in (cache_folder / "psvit").iterdir()] == ["rates.json"]


def test_measuring_that_fails_is_one_warning(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> dict[str, float]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(probe, "_measure", broken)
    with pytest.warns(UserWarning, match="could not be measured: no memory") as caught:
        assert probe.rates("cpu").origin.endswith("measuring failed")
        assert probe.rates("cpu").origin.endswith("measuring failed")
    assert len(caught) == 1 and not storage.file_of("rates").exists()


def test_deterministic_mode_freezes_the_choice(cache_folder: Path, probed: list) -> None:
    probe._known[probe.device_key(CPU)] = probe._ASSUMED["cuda"]
    before = pk.explain((8, 12, 577, 64), device="cpu")
    torch.use_deterministic_algorithms(True)
    frozen = probe.rates("cpu")
    assert frozen[:-1] == probe._ASSUMED["cpu"][:-1]
    assert probe.rates("cuda")[:-1] == probe._ASSUMED["cuda"][:-1]
    text = pk.explain((8, 12, 577, 64), device="cpu")
    assert text != before and "deterministic mode freezes the choice" in text
    assert not probed


def test_other_devices_are_not_measured(cache_folder: Path, probed: list) -> None:
    found = probe.rates("meta")
    assert "nothing is measured on meta" in found.origin
    assert choice.resolve((8, 12, 197, 197, 64), 2, BF16, torch.device("meta"), False) == "dense"
    assert not probed


def test_nothing_is_measured_while_a_graph_is_captured(
    cache_folder: Path, probed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(probe, "device_key", lambda device: "a GPU")
    monkeypatch.setattr(probe, "_memory", lambda device: 8e10)
    assert "while a CUDA graph is captured" in probe.rates(GPU).origin
    assert not probed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert probe.rates(GPU)[:-1] == (*(MEASURED[n] for n in MEASURED), 8e10)
    assert probed == [GPU]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "measured just now" in probe.rates(GPU).origin


def test_nothing_is_measured_with_fake_tensors(cache_folder: Path, probed: list) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert "while PyTorch traces" in probe.rates("cpu").origin
    assert not probed


def test_threads_may_ask_at_once(cache_folder: Path, probed: list) -> None:
    found: list[Rates] = []
    threads = [threading.Thread(target=lambda: found.append(probe.rates("cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({rates[:-1] for rates in found}) == 1


def test_info_shows_what_is_kept_and_measures_nothing(cache_folder: Path, probed: list) -> None:
    def shown() -> str:
        return dict(info.lines(info.collect()))["rates"]

    assert shown() == "not measured yet: psvit_kernels.explain(...) does" and not probed
    probe.rates("cpu")
    assert shown().startswith(f"{probe.device_key(CPU)}: copy 4 TB/s, exponentials 3 T/s")
    assert len(probed) == 1


# --- the kernel that counts exponentials --------------------------------------------------------

_INTERPRETED = """
import torch
from psvit_kernels.triton.exponentials import ROUNDS, exponentials
x = torch.linspace(0, 8, 1500)
expected = x
for _ in range(ROUNDS):
    expected = torch.exp2(-expected)
torch.testing.assert_close(exponentials(x), expected)
"""


@needs_triton
def test_exponentials_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
