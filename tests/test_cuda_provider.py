"""The CUDA provider: what it must serve, what it refuses with which words, and by which kernels.

Elsewhere, what it refuses is skipped (``conftest.py``); what it must not refuse stands here.
Without a GPU the kernels are emulated.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from forced_providers import CUDA_DEVICE, CUDA_FAMILIES, cuda_kernels
from inputs import BF16, F16, F32, F64, guarded, normal

import psvit_kernels as pk
from psvit_kernels import codes, cuda, registry
from psvit_kernels.maps import row_pitch

HALVES = [BF16, F16]


@pytest.fixture(params=CUDA_FAMILIES)
def family(request):
    """Forced, without the gradients that other tests get from the reference."""
    kernels = cuda_kernels(request.param, gradients=False)
    with kernels, registry.use("cuda"), torch.device(CUDA_DEVICE):
        yield request.param


# --- what it serves ---------------------------------------------------------------------------


def attention_args(n=50, d=64, dtype=BF16, bias=None, form: bool | torch.dtype = True, rows=None):
    q, k, v = (normal(1, 2, size, d, dtype=dtype) for size in (rows or n, n, n))
    return q, k, v, bias, d**-0.5, form


def dense_args(n=50, d=64, dtype=BF16, head_index=None, correction=None, dropout=0.0):
    storage = torch.zeros(1, 2, n, row_pitch(n, 2), dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    return storage, normal(3, 2, n, d, dtype=dtype), head_index, correction, dropout, seed, []


def quantized_args(n=50, d=64, dtype=BF16, code="uint8"):
    storage = torch.zeros(1, 2, n, row_pitch(n, 1)).to(codes.CODES[code])
    rest = (None, None, 0.0, None, [])
    return storage, torch.ones(1, 2, n), normal(3, 2, n, d, dtype=dtype), *rest


def pool_args(kind="max", channels=64, dtype=BF16, weight=None, groups=1, residual=None, kernel=3):
    window = ([1, 1], [2, 2], [0, 0]) if kind == "stride" else ([kernel] * 2, [2, 2], [1, 1])
    x = normal(2, 50, channels, dtype=dtype)
    return x, residual, [7, 7], 1, kind, *window, weight, None, groups, None, None, 1e-6


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n", [1, 5, 49, 50, 64, 65, 196, 197, 208, 256, 257, 272])
def test_short_rows_are_served_with_any_head_dim(family, n, dtype):
    for d in range(8, 129, 8):
        assert cuda.supports("attention", attention_args(n, d, dtype)) is None
        assert cuda.supports("apply_dense", dense_args(n, d, dtype)) is None
        for name, code in codes.CODES.items():
            args = attention_args(n, d, dtype, form=code)
            assert cuda.supports("attention_quantized", args) is None
            assert cuda.supports("apply_quantized", quantized_args(n, d, dtype, name)) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n", [577, 1025])
def test_long_rows_of_maps_are_served_with_heads_of_64(family, n, dtype):
    assert cuda.supports("apply_dense", dense_args(n, 64, dtype)) is None
    for code in codes.CODES:
        assert cuda.supports("apply_quantized", quantized_args(n, 64, dtype, code)) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels", [8, 192, 384, 768, 1024, 1536])
def test_pools_are_served(family, channels, dtype):
    for kind in ("max", "avg", "stride"):
        assert cuda.supports("token_pool", pool_args(kind, channels, dtype)) is None
    weight = normal(channels, 1, 3, 3)
    depthwise = pool_args("conv", channels, dtype, weight, channels, normal(2, 50, channels))
    assert cuda.supports("token_pool", depthwise) is None


def test_every_operation_has_kernels_of_both_families(family):
    for op in ("apply", "attention", "token_pool"):
        assert cuda._cuda.families[op] == list(CUDA_FAMILIES)


def test_limits_are_those_of_the_kernels(family):
    pool = cuda.MAX_POOL_CHANNELS, cuda.MAX_POOL_WEIGHTS
    assert cuda._cuda.limits == (cuda.MAX_TOKENS, cuda.MAX_HEAD_DIM, *pool)


# --- what it refuses --------------------------------------------------------------------------


def changed(args: tuple, index: int, change) -> tuple:
    """The arguments with one of them replaced by what is made of it."""
    return (*args[:index], change(args[index]), *args[index + 1 :])


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, 6 bytes further in memory."""
    return guarded(t, 3)


def gapped(t: torch.Tensor) -> torch.Tensor:
    """The same values with 8 bytes between the rows."""
    return guarded(t, 0, (0, 0, 0, 4))


HALF_ONLY = "not torch.bfloat16 or torch.float16"
UNPADDED = "rows of the map of {} elements, not padded to multiples of 16 bytes"

REFUSED = {
    "float32": (
        "attention",
        lambda: attention_args(dtype=F32),
        f"dtype torch.float32, {HALF_ONLY}",
    ),
    "float64": ("token_pool", lambda: pool_args(dtype=F64), f"dtype torch.float64, {HALF_ONLY}"),
    "273 tokens": ("attention", lambda: attention_args(273), "273 tokens > 272"),
    "head dim 20": (
        "attention",
        lambda: attention_args(d=20),
        "head dim 20, not a multiple of 8 up to 128",
    ),
    "head dim 136": (
        "apply_dense",
        lambda: dense_args(d=136),
        "head dim 136, not a multiple of 8 up to 128",
    ),
    "bias": (
        "attention_quantized",
        lambda: attention_args(bias=normal(1, 2, 50, 50, dtype=BF16), form=torch.uint8),
        "a bias",
    ),
    "negative scale": (
        "attention",
        lambda: changed(attention_args(), 4, lambda _: -0.5),
        "scale -0.5, below 0",
    ),
    "dropout": ("apply_dense", lambda: dense_args(dropout=0.5), "dropout"),
    "start of q": (
        "attention",
        lambda: changed(attention_args(), 0, shifted),
        "q starts 6 bytes after a multiple of 16",
    ),
    "rows of v": (
        "attention",
        lambda: changed(attention_args(), 2, gapped),
        "v has strides (6800, 3400, 68, 1), not multiples of 8 elements",
    ),
    "dense map without padding": (
        "apply_dense",
        lambda: changed(dense_args(), 0, lambda p: p[..., :50].contiguous()),
        UNPADDED.format(50),
    ),
    "codes without padding": (
        "apply_quantized",
        lambda: changed(quantized_args(), 0, lambda p: p[..., :56].contiguous()),
        UNPADDED.format(56),
    ),
    "start of the map": (
        "apply_dense",
        lambda: changed(dense_args(), 0, shifted),
        "the map starts 6 bytes after a multiple of 16",
    ),
    "map of another dtype": (
        "apply_dense",
        lambda: changed(dense_args(), 0, lambda p: p.to(F16)),
        "a map of torch.float16 for values of torch.bfloat16",
    ),
    "dense convolution": (
        "token_pool",
        lambda: pool_args("conv", weight=normal(64, 64, 3, 3)),
        "a convolution that is not depthwise",
    ),
    "12 channels": (
        "token_pool",
        lambda: pool_args(channels=12),
        "12 channels, not a multiple of 8 up to 2048",
    ),
    "2056 channels": (
        "token_pool",
        lambda: pool_args(channels=2056),
        "2056 channels, not a multiple of 8 up to 2048",
    ),
    "many weights": (
        "token_pool",
        lambda: pool_args("conv", 2048, weight=normal(2048, 1, 5, 5), groups=2048, kernel=5),
        "25 weights for each of 2048 channels, over 24576 in all",
    ),
    "start of x": (
        "token_pool",
        lambda: changed(pool_args(), 0, shifted),
        "x starts 6 bytes after a multiple of 16",
    ),
    "start of the residual": (
        "token_pool",
        lambda: pool_args(residual=shifted(pool_args()[0])),
        "residual starts 6 bytes after a multiple of 16",
    ),
    "factored map": ("apply_factored", attention_args, "no kernel for this map"),
    "gradient": ("apply_dense_backward", attention_args, "no kernel for gradients"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refuses_with_a_reason(family, name):
    op, args, reason = REFUSED[name]
    assert cuda.supports(op, args()) == reason


def test_refuses_what_its_counters_cannot_hold(family):
    storage, v, *rest = dense_args(n=8)
    many = v[:, :1].expand(-1, 2**29, -1, -1)
    map_of_many = storage[:, :1].expand(-1, 2**29, -1, -1)
    reason = cuda.supports("apply_dense", (map_of_many, many, *rest))
    assert reason == f"{3 * 2**29 * 8} rows, 2^31 or more"


def test_a_dimension_of_size_one_may_have_any_stride(family):
    q = normal(5, dtype=BF16).repeat(40)[:64].as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    assert cuda.supports("attention", (q, q, q, None, 1.0, True)) is None


def test_a_forced_provider_that_refuses_says_so(family):
    q = normal(1, 1, 4, 20, dtype=BF16)
    with pytest.raises(ValueError) as caught:
        pk.attention(q, q, q)
    assert str(caught.value) == (
        'provider "cuda" was forced but cannot serve attention: head dim 20, not a multiple of 8 '
        "up to 128"
    )


def test_gradients_are_refused_when_they_are_asked_for(family):
    q = normal(1, 1, 4, 16, dtype=BF16).requires_grad_()
    out, _ = pk.attention(q, q, q)
    with pytest.raises(
        ValueError, match="cannot serve attention_backward: no kernel for gradients"
    ):
        out.sum().backward()


# --- where it serves --------------------------------------------------------------------------


def on_gpu(monkeypatch, capability: tuple[int, int]) -> torch.device:
    """As if the compiled module were there, and a GPU of this capability."""
    both = {op: list(CUDA_FAMILIES) for op in ("apply", "attention", "token_pool")}
    module = SimpleNamespace(emulated=False, families=both, architectures="sm_80, sm_90a")
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(cuda, "_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("PSVIT_CUDA_KERNELS", raising=False)
    cuda.family.cache_clear()
    cuda._capability.cache_clear()
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgets_devices():
    yield
    cuda.family.cache_clear()
    cuda._capability.cache_clear()


@pytest.mark.parametrize(
    "capability, expected",
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_80")],
)
def test_the_kernels_are_those_of_the_capability(monkeypatch, capability, expected):
    assert cuda.family(on_gpu(monkeypatch, capability)) == expected


def test_hopper_takes_the_other_kernels_when_told_so_or_without_its_own(monkeypatch):
    device = on_gpu(monkeypatch, (9, 0))
    monkeypatch.setenv("PSVIT_CUDA_KERNELS", "sm_80")
    assert cuda.family(device) == "sm_80"
    on_gpu(monkeypatch, (9, 0))
    cuda._cuda.families = {"apply": ["sm_80"], "attention": ["sm_80"]}
    assert cuda.family(device) == "sm_80"


@pytest.mark.parametrize(
    "capability, name, had",
    [((9, 0), "hopper", "sm_80 or sm_90a"), ((8, 0), "sm_90a", "sm_80"), ((9, 0), "", "sm_80 or")],
)
def test_kernels_that_are_not_there_are_an_error(monkeypatch, capability, name, had):
    device = on_gpu(monkeypatch, capability)
    monkeypatch.setenv("PSVIT_CUDA_KERNELS", name)
    with pytest.raises(ValueError) as caught:
        cuda.family(device)
    assert str(caught.value).startswith(
        f'PSVIT_CUDA_KERNELS: got "{name}", expected what was compiled and this GPU runs: {had}'
    )


@pytest.mark.parametrize(
    "capability, most",
    [((8, 0), None), ((8, 6), 101376), ((8, 9), 101376), ((9, 0), None), ((12, 0), 101376)],
)
def test_attention_refuses_what_is_too_wide_for_smaller_gpus(monkeypatch, capability, most):
    on_gpu(monkeypatch, capability)
    cuda._cuda.attention_shared = lambda family, tokens, dim: 2 * 208 * dim * 2
    reason = cuda._attention_reason(*attention_args(197, 128))
    refused = f"197 tokens of head dim 128: 106496 bytes of shared memory > {most}"
    assert reason == (refused if most else None)


def test_refuses_old_gpus_and_other_devices(monkeypatch):
    args = attention_args()
    on_gpu(monkeypatch, (7, 5))
    assert cuda.supports("attention", args) == "device cpu, not cuda"
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=BF16)
    assert cuda.supports("attention", (q,)) == "compute capability (7, 5), below (8, 0)"


def test_says_why_it_is_missing(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_import_error", "no such file")
    assert cuda.missing() == "no such file" == cuda.supports("attention", attention_args())
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(emulated=False))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda._no_gpu.__wrapped__() == "PyTorch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda._no_gpu.__wrapped__() == "no GPU that PyTorch can use"


@pytest.mark.skipif(cuda.compiled_for() is None, reason="no compiled module")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_launch_that_fails_is_an_error_in_words():
    window, none = (1, 1, 2, 2, 0, 0), (0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"CUDA driver|CUDA-capable"):
        cuda._cuda.token_pool(
            "sm_80", (0, 0), True, "stride", (1, 8, 0), (4, 4, 2, 2), window, (16, 128, 8),
            (0, 0, 0), 16, False, none, 0.0,
        )  # fmt: skip


def test_is_never_chosen_by_itself(family):
    assert not any("cuda" in names for names in registry.PREFERENCE.values())
    with registry.use("auto"):
        assert registry.choose("attention", attention_args()) is not cuda
