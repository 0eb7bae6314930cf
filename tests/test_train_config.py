"""The config of a training run: types, ranges, unknown keys, YAML, what resuming allows."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from psvit.train.config import OPTIONS, Config, read_yaml


def test_every_field_has_its_option_in_the_same_order():
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(Config)]


def test_defaults_are_deits_recipe():
    config = Config(data="digits")
    assert (config.epochs, config.batch, config.warmup_epochs) == (300, 1024, 5)
    assert config.peak_lr == 5e-4 * 1024 / 512
    assert (config.weight_decay, config.label_smoothing, config.drop_path) == (0.05, 0.1, 0.1)
    assert (config.mixup, config.cutmix, config.random_erasing) == (0.8, 1.0, 0.25)
    assert (config.auto_augment, config.ema, config.clip_grad) == (
        "rand-m9-mstd0.5-inc1",
        0.99996,
        1.0,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data: missing; expected digits, a folder of images, an .npz file, torch/NAME.*"),
        ({"epoch": 3}, r'unknown key "epoch"; did you mean epochs\?'),
        ({"learning_rat": 3}, r'unknown key "learning_rat"; expected of: data, output, model, .*'),
        ({"epochs": 0}, "epochs: got 0, expected a whole number from 1"),
        ({"epochs": 2.5}, "epochs: got 2.5, expected a whole number from 1"),
        ({"epochs": True}, "epochs: got True, expected a whole number from 1"),
        ({"lr": "fast"}, "lr: got 'fast', expected a number or nothing from 0"),
        ({"lr": float("nan")}, "lr: got nan, expected a number or nothing from 0"),
        ({"distill": 1.5}, "distill: got 1.5, expected a number from 0 to 1"),
        ({"compile": "yes"}, "compile: got 'yes', expected true or false"),
        ({"amp": "half"}, 'amp: got \'half\', expected "auto" or "none" or .*'),
        ({"model_args": 3}, "model_args: got 3, expected keys and values"),
        ({"ema": 1.0}, "ema: got 1.0, expected a decay below 1"),
        (
            {"model": "psvit"},
            'schedule: got None with the model "psvit", expected a schedule with the model '
            '"psvit" and only there',
        ),
        (
            {"schedule": "AS"},
            'schedule: got AS with the model "psvit_2d_tiny", expected a schedule .*',
        ),
        (
            {"model": "psvit", "schedule": "AS"},
            "widths: got None, expected them where a schedule is",
        ),
        (
            {"model": "psvit", "schedule": "AS", "widths": [1.5]},
            r"widths: got \[1.5\], expected a whole number or whole numbers or nothing",
        ),
    ],
)
def test_a_bad_config_is_refused_by_the_name_of_its_key(values, message):
    values = {"data": "digits", **values} if values else values
    with pytest.raises(ValueError, match=f"^{message}$"):
        Config.of(values)


@pytest.mark.parametrize(
    ("key", "given", "taken"),
    [
        ("lr", "1e-3", 1e-3),  # YAML 1.1 reads it as a text
        ("lr", 1, 1.0),
        ("lr", None, None),
        ("model_args", {"patch_size": 4}, {"patch_size": 4}),
        ("num_classes", 12, 12),
    ],
)
def test_values_get_their_types(key, given, taken):
    value = getattr(Config.of({"data": "digits", key: given}), key)
    assert value == taken and type(value) is type(taken)


@pytest.mark.parametrize(
    ("given", "taken"), [(64, 64), ([64, 128], [64, 128]), ("64,128", [64, 128])]
)
def test_widths_are_one_number_or_several(given, taken):
    config = Config(data="digits", model="psvit", schedule="AS|A", widths=given)
    assert config.widths == taken


def test_a_config_goes_through_yaml_and_comes_back_equal(tmp_path):
    import yaml

    config = Config(
        data="digits", model="psvit", schedule="AS|A", widths=[64, 128], model_args={"dims": 1}
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert Config.of(read_yaml(path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("a: [", "not YAML"), ("just words", "expected lines such as")],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(path)
    assert str(path) in str(error.value)


def test_the_readmes_config_is_one(tmp_path):
    readme = Path(__file__).parents[1] / "README.md"
    (text,) = re.findall(r"```yaml\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "digits.yaml").write_text(text)
    config = Config.of(read_yaml(tmp_path / "digits.yaml"))
    assert (config.epochs, config.lr, config.auto_augment) == (30, 2e-3, None)


def test_a_resumed_run_may_differ_in_what_results_do_not_depend_on():
    config = Config(data="digits")
    free = {"output": "elsewhere", "workers": 0, "save_every": 5, "tensorboard": False}
    assert not config.differences(dataclasses.replace(config, **free))
    other = dataclasses.replace(config, epochs=10, seed=1)
    assert config.differences(other) == ["epochs was 300, is 10", "seed was 0, is 1"]
