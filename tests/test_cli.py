"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from surroundings import DATA

from psvit import cli
from psvit.commands import common, models
from psvit.images import Preprocess, find_images, load_image, preprocess_of, read_labels
from psvit.outputs import has_classes

Image = pytest.importorskip("PIL.Image")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = DATA / "vit_tiny_patch16_224" / "model.safetensors"
needs_data = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no data in {DATA.name}: PSVIT_DATA")

#: timm's smallest ViT: six layers, 160 pixels.
MODEL, DEPTH, SIDE = "test_vit", 6, 160


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, labels, weights, and files that are none of them."""
    folder = tmp_path_factory.mktemp("place")
    random = np.random.default_rng(0)
    for name in ("photos", "empty", "broken"):
        (folder / name).mkdir()
    for i in range(5):
        pixels = random.integers(0, 256, (170 + 9 * i, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    (folder / "broken" / "half.png").write_bytes((folder / "photos/0.png").read_bytes()[:3000])
    (folder / "note.txt").write_text("not an image")
    names = "".join(f"{i}.png,{i}\n" for i in range(5))
    (folder / "labels.csv").write_text("file,label\n" + names)
    (folder / "few.csv").write_text("file,label\n0.png,1\n")
    (folder / "huge.csv").write_text("file,label\n" + names.replace("4\n", "1000\n"))
    (folder / "wrong.csv").write_text("name;class\na;b\n")
    torch.manual_seed(0)
    model = timm.create_model(MODEL)
    safetensors.save_model(model, str(folder / "model.safetensors"))
    torch.save({"state_dict": model.state_dict()}, folder / "model.pt")
    other = timm.create_model(MODEL, embed_dim=32, num_heads=1)
    safetensors.save_model(other, str(folder / "other.safetensors"))
    (folder / "bad.safetensors").write_text("no tensors")
    (folder / "bad.pt").write_text("no tensors")
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- bad input ------------------------------------------------------------------------------

ACCELERATE = ("accelerate", MODEL, "--seconds", "0")
PLAIN = (*ACCELERATE, "--schedule", "AAAAAA")
PHOTOS = (*PLAIN, "--images", "{}/photos")
ANALYZE = ("analyze", MODEL, "--output", "{}/analysis")

BAD_INPUT = [
    ((), "the following arguments are required: COMMAND"),
    (("acelerate",), "invalid choice: 'acelerate'"),
    (("accelerate",), "the following arguments are required: MODEL"),
    (("accelerate", "test_vit"), "expected one of --schedule, --plan and --merge"),
    ((*ACCELERATE, "--merge", "3", "--protect", "-1"), "protect: got -1.0, expected a number from"),
    ((*ACCELERATE, "--merge", "3,x"), "got 3,x, expected a number, one for each layer"),
    ((*ACCELERATE, "--merge", "3,3"), "merge: got 2 numbers, expected 6 as layers"),
    ((*ACCELERATE, "--merge", "0.01"), 'merge: got "0.01", but merging all that can be leaves'),
    (("demo", "--epochs", "0"), "argument --epochs: got 0, expected a whole number from 1 up"),
    (("demo", "--output", "{}/note.txt"), "--output can't be written: {}/note.txt: File exists"),
    (("demo", "--output", "{}/note.txt/below"), "note.txt/below: Not a directory"),
    (
        ("accelerate", "test_vitt", "--schedule", "A"),
        "timm has no test_vitt; did you mean test_vit",
    ),
    (("accelerate", "torchvision:vit_b_61", "--schedule", "A"), "did you mean vit_b_16"),
    (("accelerate", "onnx:vit", "--schedule", "A"), "model: got onnx:vit, expected a name of timm"),
    (("accelerate", "hf:{}/empty", "--schedule", "A"), "is not a model folder (it has no config"),
    (("accelerate", "test_convnext", "--schedule", "A"), "which psvit doesn't know; it knows timm"),
    ((*ACCELERATE, "--schedule", "AAAA"), 'schedule "AAAA": has 4 layers, expected 6 as the model'),
    ((*ACCELERATE, "--schedule", "AAB"), 'character 3 is "B", expected A'),
    ((*ACCELERATE, "--schedule", "AAA|SAA"), "layer 4 shares across a pool; start each stage with"),
    ((*PLAIN, "--pool", "mean"), "argument --pool: invalid choice: 'mean'"),
    ((*PLAIN, "--batch", "-1"), "argument --batch: got -1, expected a whole number"),
    ((*PLAIN, "--mean", "a"), "argument --mean: got a, expected 0.5 or 0.5,0.5,0.5"),
    ((*PLAIN, "--mean", "1,2"), "argument --mean: got 1,2, expected"),
    ((*PLAIN, "--std", "0"), "--std: got 0, expected more than 0"),
    ((*PLAIN, "--crop", "1.5"), "--crop: got 1.5, expected more than 0 and at most 1"),
    ((*PLAIN, "--select", "5"), "argument --select: got 5, expected START:STOP"),
    ((*PHOTOS, "--select", "9:"), "--select: leaves none of the 5 images"),
    ((*PLAIN, "--weights", "{}/gone.pt"), "--weights: {}/gone.pt: no such file"),
    ((*PLAIN, "--weights", "{}/bad.pt"), "--weights: {}/bad.pt can't be read"),
    ((*PLAIN, "--weights", "{}/bad.safetensors"), "--weights: {}/bad.safetensors can't be read"),
    ((*PLAIN, "--weights", "{}/other.safetensors"), "doesn't fit test_vit: another shape of cls_"),
    ((*PLAIN, "--images", "{}/gone"), "{}/gone: no such file or folder"),
    ((*PLAIN, "--images", "{}/empty"), "{}/empty: no images in this folder"),
    ((*PLAIN, "--images", "{}/note.txt"), "{}/note.txt: not an image that can be read"),
    ((*PLAIN, "--images", "{}/broken"), "{}/broken/half.png: not an image that can be read"),
    ((*PLAIN, "--labels", "{}/labels.csv"), "--labels: expected --images too"),
    ((*PHOTOS, "--labels", "{}/gone.csv"), "{}/gone.csv: no such file"),
    ((*PHOTOS, "--labels", "{}/wrong.csv"), "{}/wrong.csv: expected a CSV file with the columns"),
    ((*PHOTOS, "--labels", "{}/few.csv"), "{}/few.csv: no label for 1.png (4 files without one)"),
    ((*PHOTOS, "--labels", "{}/huge.csv"), "--labels: got class 1000, expected 0 to 999"),
    ((*PLAIN, "--output", "{}/gone/f.safetensors"), "--output can't be written: {}/gone"),
    ((*PLAIN, "--output", "{}/photos"), "--output can't be written: {}/photos"),
    (ANALYZE, "--images: expected a folder of images, or one image"),
    ((*ANALYZE, "--images", "{}/broken"), "{}/broken/half.png: not an image"),
    ((*ANALYZE, "--images", "{}/photos", "--shared", "6"), "shared: got 6, expected 0 to 5 for 6"),
    ((*ANALYZE, "--images", "{}/photos", "--pools", "6"), "pools: got (6,), expected different"),
    ((*ANALYZE, "--images", "{}/photos", "--pools", "x"), "argument --pools: got x, expected a wh"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("argv", "message"), BAD_INPUT, ids=[m for _, m in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_code_2(
    argv: tuple[str, ...], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    code, out, err = run(capsys, *(a.replace("{}", str(place)) for a in argv))
    lines = [line for line in err.splitlines() if line and not line.startswith("no --weights")]
    assert code == 2 and out == ""
    assert len(lines) == 1 and lines[0].startswith("psvit"), err
    assert message.replace("{}", str(place)) in lines[0]
    assert sorted(place.rglob("*")) == before, "bad input left a file behind"


@pytest.mark.parametrize(
    ("argv", "gone", "extra"),
    [
        (PLAIN, "timm", "timm"),
        (("accelerate", "hf:x", "--schedule", "A"), "transformers", "hf"),
        (("demo",), "sklearn", "demo"),
        (("demo",), "matplotlib", "demo"),
        ((*ANALYZE, "--images", "x"), "matplotlib", "demo"),
        (PHOTOS, "PIL", "demo"),
    ],
)
def test_a_missing_extra_is_named(
    argv: tuple[str, ...],
    gone: str,
    extra: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = common.importlib.util.find_spec
    monkeypatch.setattr(
        common.importlib.util, "find_spec", lambda name: None if name == gone else find(name)
    )
    code, out, err = run(capsys, *(a.replace("{}", str(place)) for a in argv))
    assert (code, out) == (2, "")
    assert f'{gone} not installed; run: pip install "psvit[{extra}]"' in err
    assert not (place / "analysis").exists()


# --- help -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "examples:" in out and f"psvit {command}" in out and "--json" in out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.startswith("psvit ")


# --- accelerate -----------------------------------------------------------------------------


def test_accelerate_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, *ACCELERATE, "--schedule", "AAS|ASS", "--weights", place / "model.safetensors",
        "--images", place / "photos", "--labels", place / "labels.csv", "--batch", 2, "--json",
        "--size-bias", "--output", place / "fast.safetensors",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and found["schedule"] == "AAS|ASS" and found["tuned"] is False
    assert [layer["kind"] for layer in found["layers"]] == ["", *"AASASS", ""]
    assert [layer["donor"] for layer in found["layers"]] == [None] * 3 + [2, None, 4, 4, None]
    flops = [sum(layer["flops"][when] for layer in found["layers"]) for when in ("before", "after")]
    assert found["flops"]["ratio"] == pytest.approx(flops[0] / flops[1]) and flops[0] > flops[1]
    assert [row["batch"] for row in found["latency"]] == [1, 2]
    assert found["agreement"]["images"] == 5 and found["agreement"]["kl_nats"] > 0
    assert 0 <= found["agreement"]["accuracy_after"] <= 1
    assert found["largest_difference_from_reference"] < 1e-3
    saved = safetensors.load_file(place / "fast.safetensors")
    assert saved.keys() == timm.create_model(MODEL).state_dict().keys()
    (place / "fast.safetensors").unlink()


@pytest.mark.parametrize("merge", ["2", "2,2,2,2,2,2", "0.8"])
def test_accelerate_merges(merge: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *ACCELERATE, "--merge", merge, "--protect", "0.1", "--json")
    found = json.loads(out)
    assert found["protect"] == 0.1
    assert code == 0 and found["schedule"] == "AAAAAA" and len(set(found["merge"])) == 1
    r, tokens = found["merge"][0], [layer["tokens"]["after"] for layer in found["layers"][1:-1]]
    assert r > 0 and tokens == [tokens[0] - r * i for i in range(6)]
    assert found["flops"]["ratio"] > 1


def test_accelerate_draws_what_was_merged(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((place / "photos").iterdir())
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--schedule", "AAA|AAA", "--pool", "avg")):
        code, out, _ = run(capsys, *ACCELERATE, "--merge", 2, "--show", image, *more)
        assert code == 0 and f"Drawn: {image.stem}-merged.png" in " ".join(out.split())
        picture = tmp_path / f"{image.stem}-merged.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    code, _, err = run(capsys, *PLAIN, "--show", image)
    assert code == 2 and "--show: expected --merge too" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_a_schedule_of_a_changes_nothing(
    weights: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys, *PLAIN, "--weights", place / weights, "--images", place / "photos", "--json"
    )
    found = json.loads(out)
    assert code == 0 and found["flops"]["ratio"] == 1
    assert found["agreement"]["top1_agreement"] == 1
    assert abs(found["agreement"]["kl_nats"]) < 1e-6


def test_accelerate_prints_tables(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *ACCELERATE, "--schedule", "AAA|ASS", "--batch", 1)
    assert code == 0
    assert "map of 4" in out and "FLOPs of one image" in out and "latency, batch 1" in out
    assert "Neither calibrated nor fine-tuned" in out
    assert "no --weights: they are random" in err


# --- analyze --------------------------------------------------------------------------------


def test_analyze_writes_a_picture_and_json(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "analyze", MODEL, "--weights", place / "model.pt", "--images", place / "photos",
        "--shared", 2, "--pools", 3, "--output", tmp_path / "a",
    ]  # fmt: skip
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "Proposed schedule with 2 sharing layers" in out
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "analysis.json",
        "attention-similarity.png",
    ]
    code, out, _ = run(capsys, *argv, "--json")
    found = json.loads(out)
    assert found == json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert found["schedule"].count("S") == 2 and found["schedule"][3] == "|"
    assert found["images"] == 5 and found["depth"] == DEPTH


# --- models and images ----------------------------------------------------------------------


def loaded(*argv: object) -> models.Loaded:
    parser = cli.build_parser("accelerate")
    return models.load(parser.parse_args(["accelerate", *map(str, argv), "--schedule", "A"]))


def test_weights_say_how_many_classes_there_are(tmp_path: Path) -> None:
    model = timm.create_model(MODEL, num_classes=7)
    safetensors.save_model(model, str(tmp_path / "m.safetensors"))
    assert loaded(MODEL, "--weights", tmp_path / "m.safetensors").model.num_classes == 7


def test_a_folder_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    found = loaded(f"hf:{tmp_path}", "--std", "0.25")
    assert found.depth == 2 and found.preprocess.size == (32, 32)
    assert found.preprocess.mean == (0.1, 0.2, 0.3) and found.preprocess.std == (0.25,) * 3
    argv = ("accelerate", f"hf:{tmp_path}", "--schedule", "A|A", "--seconds", 0, "--json")
    code, out, err = run(capsys, *argv)
    assert code == 0 and json.loads(out)["weights"] == str(tmp_path), err


def test_a_model_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = pytest.importorskip("torchvision.models")
    small = vision.VisionTransformer(32, 8, 2, 2, 32, 64)
    monkeypatch.setattr(vision, "get_model", lambda name, weights: small)
    found = loaded("torchvision:vit_b_16")
    assert found.depth == 2 and has_classes(found.model) and found.weights is None


def test_timm_says_what_its_images_need() -> None:
    found = preprocess_of(timm.create_model(MODEL))
    assert found.size == (SIDE, SIDE) and found.mean == (0.5, 0.5, 0.5) and found.crop == 0.95


@pytest.mark.parametrize(
    ("width", "height", "scaled"),
    [(100, 60, 16 / 60), (10, 8, 2.0), (18, 17, 1.0), (40, 16, 1.0), (64, 64, 20 / 64)],
)
def test_images_are_resized_no_more_than_needed(
    width: int, height: int, scaled: float, tmp_path: Path
) -> None:
    """The crop of 16 is 0.8 of the resized picture, so 20 is what a large one is brought to."""
    image = Image.new("RGB", (width, height), (255, 0, 51))
    image.save(tmp_path / "a.png")
    preprocess = Preprocess(size=(16, 16), mean=(0.0, 0.5, 0.2), std=(1.0, 0.5, 0.1), crop=0.8)
    found = load_image(tmp_path / "a.png", preprocess)
    expected = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 16, 16)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_centre_is_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((8, 12, 3), dtype=np.uint8)
    pixels[2:6, 4:8] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    plain = Preprocess(size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.5)
    assert load_image(tmp_path / "a.png", plain).min() == 1


def test_images_of_a_folder_are_sorted_and_other_files_left_out(place: Path) -> None:
    assert [p.name for p in find_images(place / "photos")] == [f"{i}.png" for i in range(5)]
    assert {p.suffix for p in find_images(place)} == {".png"}


def test_labels_follow_the_files(place: Path) -> None:
    files = [place / "photos" / f"{i}.png" for i in (3, 1)]
    assert read_labels(place / "labels.csv", files) == [3, 1]


# --- interruption ---------------------------------------------------------------------------


def test_ctrl_c_ends_with_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("psvit.commands.info.run", stop)
    assert run(capsys, "info") == (130, "", "psvit info: interrupted, nothing was written\n")


def test_a_real_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "psvit", "demo", "--threads", "1", "--output", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/.unfinished-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(12):  # one that comes inside an import may be lost there
            process.send_signal(signal.SIGINT)
            try:
                _, err = process.communicate(timeout=10)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
    # Both are 130 in a shell: Python ends by the signal itself if it came inside some C code.
    assert process.returncode in (130, -signal.SIGINT)
    assert err.strip().endswith("psvit demo: interrupted, nothing was written")
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


# --- the real model -------------------------------------------------------------------------


@needs_data
def test_the_real_vit_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "accelerate", "vit_tiny_patch16_224", "--schedule", "AAAAAAAAAAAS", "--json",
        "--weights", WEIGHTS, "--images", DATA / "imagenet_val", "--select", "400:424",
        "--labels", DATA / "imagenet_val" / "labels.csv", "--seconds", 0, "--batch", 4,
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["agreement"]["accuracy_before"] > 0.6
    assert found["agreement"]["top1_agreement"] > 0.5
