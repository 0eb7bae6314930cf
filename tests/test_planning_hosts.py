"""Plans for every kind of model: those that psvit knows, those it refuses, README's examples."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import hosts
import pytest
import torch
from image_sources import write_images
from surroundings import silent, threads
from torch import nn

import psvit
from psvit import cli
from psvit.outputs import has_classes

pytest.importorskip("safetensors")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("make", hosts.EVERY)
def test_a_plan_is_made_saved_applied_and_distilled(make: Callable[[], nn.Module], tmp_path):
    torch.manual_seed(0)
    model, images = make(), torch.randn(40, 3, 32, 32)
    if not has_classes(model):
        with pytest.raises(ValueError, match=r"^model: got a \w+ without classes, expected some$"):
            psvit.plan(model, images, "flops<=0.85", progress=silent)
        return
    plan = psvit.plan(model, images, "flops<=0.85", longest=2, progress=silent)
    assert plan.found["cost"] <= 0.85
    plan.save(tmp_path / "plan.json")
    torch.manual_seed(0)
    fresh = psvit.Plan.load(tmp_path / "plan.json").apply(make())
    want, got = (hosts.answer(m, images) for m in (plan.apply(model), fresh))
    assert torch.equal(got, want), f"largest difference {(got - want).abs().max()}"
    how = psvit.Distillation(steps=2, batch=4)
    tuned = psvit.distill(model, plan, images, how, progress=silent)
    losses = plan.found["measured"]["error"], tuned.found["measured"]["error"]
    assert losses[1] <= losses[0] * (1 + 1e-6), losses


@pytest.mark.parametrize(("make", "named"), hosts.UNKNOWN.values(), ids=hosts.UNKNOWN.keys())
def test_other_blocks_are_refused_by_name_and_left_as_they_are(make, named):
    model, images = make(), torch.randn(8, 3, 32, 32)
    structure, state = repr(model), {n: p.clone() for n, p in model.state_dict().items()}
    for run in (
        lambda: psvit.accelerate(model, "AAAA", inplace=True),
        lambda: psvit.calibrate(model, "ASAA", images, progress=silent),
        lambda: psvit.plan(model, images, "flops<=0.8", progress=silent),
    ):
        with pytest.raises(ValueError, match=rf"^model: .*{re.escape(named)}") as caught:
            run()
        assert "\n" not in str(caught.value)
    assert repr(model) == structure
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def plan_of_another(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    images = torch.randn(40, 3, 32, 32)
    with threads(1):
        plan = psvit.plan(hosts.timm_vit(), images, "flops<=0.85", longest=2, progress=silent)
    plan.save(file)
    return file


def test_distilling_a_model_of_other_blocks_names_what_the_plan_lacks(plan_of_another):
    make, _ = hosts.UNKNOWN["timm-windows"]
    plan = psvit.Plan.load(plan_of_another)
    with pytest.raises(ValueError, match="the plan was made for another one: it lacks") as caught:
        psvit.distill(make(), plan, torch.randn(8, 3, 32, 32), progress=silent)
    assert "\n" not in str(caught.value)


COMMANDS = {
    "accelerate": ("--schedule", "ASAA"),
    "calibrate": ("--schedule", "ASAA"),
    "plan": ("--budget", "flops<=0.8"),
    "distill": (),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_other_blocks_in_one_line(command, plan_of_another, tmp_path, capsys):
    pytest.importorskip("PIL")
    hosts.hub_swin().save_pretrained(tmp_path / "swin")
    write_images(tmp_path / "photos", 2)
    options = [*COMMANDS[command], "--images", str(tmp_path / "photos")]
    if command == "distill":
        options += ["--plan", str(plan_of_another)]
    if command != "accelerate":
        options += ["--output", str(tmp_path / "out.json")]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main([command, f"hf:{tmp_path / 'swin'}", *options]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("error") == 1, captured
    line = captured.err.splitlines()[-1]  # after the bar of transformers
    assert line.startswith(f"psvit {command}: error: model: got SwinModel"), line
    assert "is a transformers SwinAttention; windows, rotary embedding" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def loaders(monkeypatch):
    """Hosts load small random models in place of those of README's examples."""
    timm, hub = pytest.importorskip("timm"), pytest.importorskip("transformers")
    models = pytest.importorskip("torchvision.models")
    size = dict(image_size=224, patch_size=28)

    def load(owner: object, name: str, make: Callable[[], object]) -> None:
        def loaded(*args: object, **options: object) -> object:
            torch.manual_seed(0)  # the same one each time
            return make()

        monkeypatch.setattr(owner, name, loaded)

    load(timm, "create_model", lambda: hosts.timm_vit(img_size=224, patch_size=28))
    load(models, "vit_b_16", lambda: hosts.torchvision_vit(**size))
    classifier = ("ViTForImageClassification", "ViTConfig")
    load(
        hub.AutoModelForImageClassification,
        "from_pretrained",
        lambda: hosts.hub_model(*classifier, **size),
    )
    load(hub.AutoImageProcessor, "from_pretrained", hub.ViTImageProcessor)


def test_the_examples_of_the_readme_run(loaders, tmp_path, monkeypatch, capsys):
    pytest.importorskip("PIL")
    write_images(tmp_path / "photos", 40)
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").split("\n## Correcting a conversion")[1]
    examples = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    assert len(examples) == 3
    names: dict = {}
    for example in examples:
        exec(example, names)
        plan, images = names["plan"], names["images"]
        assert images.shape == (40, 3, 224, 224)
        assert str(plan) in capsys.readouterr().out
        want, got = (hosts.answer(m, images) for m in (plan.apply(names["model"]), names["fast"]))
        assert torch.equal(got, want), f"{example}: largest difference {(got - want).abs().max()}"
