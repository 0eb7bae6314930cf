"""Analysis of attention maps: against loops in float64, and schedules against brute force."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import psvit
from psvit.analyze import Analysis, _Sums, analyze, choose

GRID, PREFIX, HEADS, LAYERS, IMAGES = (2, 3), 1, 2, 3, 4
TOKENS = PREFIX + GRID[0] * GRID[1]


def random_maps(generator: torch.Generator) -> list[torch.Tensor]:
    shape = (IMAGES, HEADS, TOKENS, TOKENS)
    scores = [torch.randn(shape, generator=generator) * 2 for _ in range(LAYERS)]
    return [s.softmax(-1) for s in scores]


def entropy(p: list[float]) -> float:
    return -sum(x * math.log2(x) for x in p if x > 0)


def rows_of(m: torch.Tensor, head: int) -> list[list[float]]:
    return [row for image in m[:, head].double().tolist() for row in image]


@pytest.fixture(scope="module")
def maps() -> list[torch.Tensor]:
    maps = random_maps(torch.Generator().manual_seed(1))
    maps[2][:, :, 0] = torch.eye(TOKENS)[3]  # a row with zeros: 0 log 0 must count as 0
    return maps


@pytest.fixture(scope="module")
def analysis(maps: list[torch.Tensor]) -> Analysis:
    sums = _Sums(maps, PREFIX, GRID)
    for start in (0, 1, 3):  # uneven groups of images must not matter
        end = {0: 1, 1: 3, 3: IMAGES}[start]
        sums.add([m[start:end] for m in maps])
    return sums.result()


def test_similarity_equals_a_loop_in_float64(analysis: Analysis, maps: list[torch.Tensor]) -> None:
    for i, j, head in itertools.product(range(LAYERS), range(LAYERS), range(HEADS)):
        pairs = list(zip(rows_of(maps[i], head), rows_of(maps[j], head), strict=True))
        js = cosine = 0.0
        for p, q in pairs:
            mixed = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            js += 1 - (entropy(mixed) - (entropy(p) + entropy(q)) / 2)
            dot = sum(a * b for a, b in zip(p, q, strict=True))
            cosine += dot / math.hypot(*p) / math.hypot(*q)
        assert analysis.js[i, j, head] == pytest.approx(js / len(pairs), abs=1e-5)
        assert analysis.cosine[i, j, head] == pytest.approx(cosine / len(pairs), abs=1e-5)


def test_entropy_and_distance_equal_a_loop_in_float64(
    analysis: Analysis, maps: list[torch.Tensor]
) -> None:
    places = list(itertools.product(range(GRID[0]), range(GRID[1])))
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        rows = rows_of(maps[layer], head)
        expected = sum(map(entropy, rows)) / len(rows)
        assert analysis.entropy[layer, head] == pytest.approx(expected, abs=1e-5)
        total = 0.0
        for image in range(IMAGES):
            for i, place in enumerate(places):
                p = rows[image * TOKENS + PREFIX + i][PREFIX:]
                far = [math.dist(place, other) for other in places]
                total += sum(x * d for x, d in zip(p, far, strict=True)) / sum(p)
        expected = total / IMAGES / len(places)
        assert analysis.distance[layer, head] == pytest.approx(expected, abs=1e-5)


def test_extremes() -> None:
    one_hot = torch.eye(4).expand(1, 1, 4, 4).clone()
    other = one_hot.roll(1, -1)
    uniform = torch.full((1, 1, 4, 4), 0.25)
    sums = _Sums([one_hot, other, uniform], 0, (2, 2))
    sums.add([one_hot, other, uniform])
    found = sums.result()
    assert found.similarity()[0, 1] == pytest.approx(0, abs=1e-6)
    assert found.similarity("cosine")[0, 1] == pytest.approx(0, abs=1e-6)
    assert found.similarity().diagonal().tolist() == [1, 1, 1]
    assert found.entropy[:, 0].tolist() == pytest.approx([0, 0, 2], abs=1e-6)
    assert found.distance[0, 0] == pytest.approx(0, abs=1e-6)
    assert found.distance[2, 0] == pytest.approx((1 + 1 + math.sqrt(2)) / 4, abs=1e-6)
    with pytest.raises(ValueError, match=r'by: got "?\'?l2'):
        found.similarity("l2")  # type: ignore[arg-type]


def test_to_dict_is_json(analysis: Analysis) -> None:
    read = json.loads(json.dumps(analysis.to_dict()))
    assert read["depth"] == LAYERS and read["heads"] == HEADS and read["images"] == IMAGES
    assert read["grid"] == list(GRID) and read["tokens"] == TOKENS
    assert len(read["js_similarity"]) == LAYERS


def worth(letters: str, similarity: torch.Tensor) -> float:
    """Sum of similarities between sharing layers and donors, by reading the text."""
    total, donor, layer = 0.0, 0, 0
    for letter in letters:
        if letter == "A":
            donor = layer
        elif letter == "S":
            total += float(similarity[layer, donor])
        layer += letter != "|"
    return total


def all_schedules(depth: int, shared: int, pools: tuple[int, ...]) -> list[str]:
    free = [i for i in range(depth) if i not in (0, *pools)]
    found = []
    for sharing in itertools.combinations(free, shared):
        text = ""
        for i in range(depth):
            text += ("|" if i in pools else "") + ("S" if i in sharing else "A")
        found.append(text)
    return found


@pytest.mark.parametrize("pools", [(), (3,), (2, 5), (1,), (7,)])
def test_choice_is_the_best_of_all(pools: tuple[int, ...]) -> None:
    depth, generator = 8, torch.Generator().manual_seed(len(pools))
    similarity = torch.rand(depth, depth, generator=generator, dtype=torch.float64)
    for shared in range(depth - len(pools)):
        every = all_schedules(depth, shared, pools)
        chosen = choose(similarity, shared, pools)
        assert chosen in every
        assert worth(chosen, similarity) == pytest.approx(
            max(worth(s, similarity) for s in every), abs=1e-12
        )


def test_choice_among_equals_shares_late() -> None:
    assert choose(torch.ones(6, 6), 2) == "AAAASS"
    assert choose(torch.ones(6, 6), 2, (3,)) == "AAA|ASS"
    assert choose(torch.ones(1, 1), 0) == "A"


def test_choice_handles_deep_models() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(48, 48, generator=generator, dtype=torch.float64)
    assert choose(similarity, 24, (16, 32)).count("S") == 24


@pytest.mark.parametrize(
    ("shared", "pools", "message"),
    [
        (6, (), "shared: got 6, expected 0 to 5 for 6 layers in 1 stages"),
        (5, (3,), "shared: got 5, expected 0 to 4"),
        (-1, (), "shared: got -1"),
        (1, (0,), "pools: got (0,), expected different layers from 1 to 5"),
        (1, (6,), "pools: got (6,)"),
        (1, (3, 3), "pools: got (3, 3)"),
    ],
)
def test_choice_refuses_what_does_not_fit(
    shared: int, pools: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        choose(torch.ones(6, 6), shared, pools)
    assert message in str(caught.value)


def test_plot_writes_a_picture(analysis: Analysis, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    analysis.plot(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


# --- analyze, on a model --------------------------------------------------------------------


def small_vit() -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.models.VisionTransformer(num_classes=4, **sizes)


def maps_by_hand(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """softmax(q k^T / sqrt(d)) from what each layer's qkv projection gave, in float64."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
        for block in model.blocks
    ]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    found = []
    for out in seen:
        q, k, _ = out.double().unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        found.append((q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1))
    return found


def test_a_model_is_analysed_and_left_alone() -> None:
    model, images = small_vit(), torch.randn(5, 3, 16, 24)
    by_hand = maps_by_hand(model, images)
    expected = _Sums(by_hand, 1, (2, 3))
    expected.add(by_hand)
    model.train()
    model.blocks[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    found = analyze(model, images)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (found.tokens, found.prefix, found.grid, found.images) == (7, 1, (2, 3), 5)
    for name in ("js", "cosine", "distance", "entropy"):
        exact = getattr(expected.result(), name)
        assert torch.allclose(getattr(found, name), exact, atol=1e-5), name


def test_groups_of_images_make_no_difference() -> None:
    model, images = small_vit(), torch.randn(5, 3, 16, 24)
    whole = analyze(model, images)
    for other in (analyze(model, images, budget=1), analyze(model, iter(images.split([2, 3])))):
        assert other.images == 5
        assert torch.allclose(other.js, whole.js, atol=1e-6)
        assert torch.allclose(other.entropy, whole.entropy, atol=1e-5)


def test_a_plain_conversion_is_analysed_as_the_original() -> None:
    model, images = small_vit(), torch.randn(2, 3, 16, 24)
    plain = psvit.accelerate(model, "AAA")
    assert torch.allclose(analyze(plain, images).js, analyze(model, images).js, atol=1e-6)


def test_the_proposed_schedule_fits_the_model() -> None:
    model = small_vit()
    schedule = analyze(model, torch.randn(2, 3, 16, 24)).schedule(1, (2,))
    assert schedule == psvit.Schedule("AS|A")
    with pytest.warns(UserWarning, match="changes what the model computes"):
        psvit.accelerate(model, schedule)(torch.randn(1, 3, 16, 24))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images: got none, expected at least one"),
        (torch.randn(0, 3, 16, 24), ValueError, "images: got none"),
        (torch.randn(3, 16, 24), ValueError, "images: got shape (3, 16, 24), expected (B, C, h"),
        (["a.png"], TypeError, "images: got str, expected a Tensor"),
    ],
    ids=["empty list", "empty batch", "one image", "a name"],
)
def test_bad_images(images, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        analyze(small_vit(), images)
    assert message in str(caught.value)


def test_a_converted_model_is_refused() -> None:
    with pytest.warns(UserWarning):
        fast = psvit.accelerate(small_vit(), "AAS")
    with pytest.raises(ValueError, match=r'model: is converted already, to schedule "AAS"'):
        analyze(fast, torch.randn(1, 3, 16, 24))


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model: got Linear, which psvit doesn't know"):
        analyze(torch.nn.Linear(2, 2), torch.randn(1, 3, 16, 24))
