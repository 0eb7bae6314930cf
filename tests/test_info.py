"""``psvit info`` and ``python -m psvit_kernels``."""

from __future__ import annotations

import json
import platform
import types

import pytest
import torch

from psvit import cli
from psvit_kernels import __main__ as kernels_main
from psvit_kernels import cpu, info, registry


def test_says_what_runs_here() -> None:
    found = info.collect()
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"]["intra-op"] == torch.get_num_threads()
    assert found["providers"]["reference"] == "ready"
    assert found["providers"].keys() >= registry.PROVIDERS.keys()


def test_a_missing_provider_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "missing", lambda: "no such file: libgone")
    found = info.collect()
    assert found["providers"]["cpu"] == "missing: no such file: libgone"
    assert found["cpu"]["in use by psvit"] is None and found["threads"]["openmp"] is None


@pytest.mark.skipif(cpu.missing() is not None, reason=f"no compiled kernels: {cpu.missing()}")
def test_names_the_instruction_set_in_use() -> None:
    found = info.collect()
    assert found["cpu"]["in use by psvit"] in ("portable", "avx2", "avx512")
    assert found["threads"]["openmp"]


def test_reports_fallbacks_and_the_forced_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.fallbacks, "attention: not cpu: head dim 160", 3)
    with registry.use("reference"):
        lines = info.lines(info.collect())
    assert ("forced", "reference") in lines
    assert any("3 x attention: not cpu: head dim 160" in text for _, text in lines)


def test_without_proc_the_processor_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(info, "open", missing, raising=False)
    assert info.collect()["cpu"]["features"] == []


def test_both_commands_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_main.main(["--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)
    assert cli.main(["info", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole.pop("hosts") is not None
    assert whole == kernels


def test_tables_name_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_main.main([]) == 0
    kernels = capsys.readouterr().out
    assert cli.main(["info"]) == 0
    whole = capsys.readouterr().out
    for word in ("versions", "processor", "threads", "OpenMP", "providers", "fallbacks", "limits"):
        assert word in kernels and word in whole
    assert "converts models of" in whole and "converts models of" not in kernels


def test_hosts_that_are_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = info.collect()
    found["versions"] |= {"timm": None, "transformers": None, "torchvision": "0.1"}
    monkeypatch.setattr(info, "collect", lambda: found)
    assert cli.main(["info"]) == 0
    assert "torchvision (not: timm, transformers)" in " ".join(capsys.readouterr().out.split())


def test_versions_import_no_host_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    fake = types.SimpleNamespace(
        version=lambda name: asked.append(name) or "1",  # type: ignore[func-returns-value]
        PackageNotFoundError=info.metadata.PackageNotFoundError,
    )
    monkeypatch.setattr(info, "metadata", fake)
    info.collect()
    assert {"timm", "transformers", "torchvision"} <= set(asked)
