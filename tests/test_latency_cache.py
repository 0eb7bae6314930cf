"""Latencies: measured on a machine once, and again where the file that keeps them is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from surroundings import threads

from psvit import latency_cache
from psvit.bench import machine
from psvit_kernels import use

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def made(cache_folder: Path) -> list[str]:
    """Labels whose function was made, in a cache folder of its own."""
    return []


def medians(made: list[str], *labels: str) -> dict[str, float]:
    def make(label: str):
        made.append(label)
        return lambda: None

    probes = {label: lambda label=label: make(label) for label in labels}
    return latency_cache.medians(probes, CPU, seconds=0)


def test_what_was_measured_is_not_measured_again(made):
    first = medians(made, "a", "b")
    assert first.keys() == {"a", "b"} and all(ms > 0 for ms in first.values())
    assert medians(made, "b") == {"b": first["b"]}
    assert medians(made, "c", "a")["a"] == first["a"]
    assert medians(made, "a", "b").items() == first.items()
    assert made == ["a", "b", "c"]


@pytest.mark.parametrize("what", ["threads", "kernels", "version"])
def test_on_another_machine_it_is_measured_again(made, monkeypatch, what):
    here = medians(made, "a")
    with monkeypatch.context() as patch:
        if what == "version":
            patch.setattr(machine, "versions", lambda: {"psvit": "0.0.0"})
        with (
            threads(2 if what == "threads" else 1),
            use("reference" if what == "kernels" else None),
        ):
            medians(made, "a")
    assert made == ["a", "a"]
    assert medians(made, "a") == here and made == ["a", "a"]


@pytest.mark.parametrize("text", ['{"cpu": {"a', "[1]", "\0"], ids=["cut", "list", "noise"])
def test_a_damaged_file_is_measured_again(made, cache_folder, text):
    file = cache_folder / "psvit" / "latencies.json"
    file.parent.mkdir()
    file.write_text(text)
    message = "^psvit_kernels: kept latencies could not be read .*; they are measured again"
    with pytest.warns(UserWarning, match=message):
        first = medians(made, "a")
    assert medians(made, "a") == first and made == ["a"]


@pytest.mark.parametrize("value", [None, "fast", -1.0, float("nan"), True, [1.0]])
def test_an_entry_that_is_no_time_is_measured_again(made, cache_folder, value):
    first = medians(made, "a", "b")
    file = cache_folder / "psvit" / "latencies.json"
    (key,) = json.loads(file.read_text())
    for damaged in (value, {**first, "a": value}):
        file.write_text(json.dumps({key: damaged}))
        medians(made, "a")
    assert made == ["a", "b", "a", "a"]


@pytest.mark.filterwarnings("ignore:psvit_kernels. kept latencies could not be read")
def test_a_folder_that_can_not_be_written_is_a_warning(made, cache_folder):
    (cache_folder / "psvit").write_text("a file")
    message = "measured latencies could not be kept .*; every process measures them again"
    with pytest.warns(UserWarning, match=message):
        assert medians(made, "a")["a"] > 0
