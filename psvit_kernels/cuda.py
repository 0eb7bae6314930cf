"""The CUDA C++ provider: bfloat16 and float16 on NVIDIA GPUs from compute capability 8.0 on.

Forward operations, of what the kernels in csrc/cuda are made for: short rows, stored maps, pools of
a channel at a time. Two families of kernels: "sm_80" runs on every such GPU, "sm_90a" on Hopper
(capability 9.0) alone, where it is the one that serves; PSVIT_CUDA_KERNELS=sm_80 takes the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .donors import donors
from .grid import pooled_grid
from .maps import row_pitch

try:
    import psvit_kernels._cuda as _cuda

    _import_error: str | None = None
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _import_error = str(error)
    if isinstance(error, ModuleNotFoundError):
        _import_error = "built without nvcc, or nvcc failed: PSVIT_CUDA=1 pip install . says why"

MIN_CAPABILITY = (8, 0)
MAX_TOKENS = 272  # of a row of scores, which attention keeps in registers
MAX_HEAD_DIM = 128
MAX_POOL_CHANNELS = 2048
MAX_POOL_WEIGHTS = 24 * 1024  # of a depthwise convolution and its tap of ones, in shared memory
SM_80, HOPPER = "sm_80", "sm_90a"
#: Bytes of shared memory that a block may have on Hopper.
HOPPER_SHARED = 232_448
#: What is loaded at once: rows start on multiples of it.
ALIGNMENT = 16
_DTYPES = (torch.bfloat16, torch.float16)
_CODES = {
    torch.bfloat16: "half",
    torch.float16: "half",
    torch.uint8: "uint8",
    torch.float8_e4m3fn: "e4m3",
}


def missing() -> str | None:
    """Why this provider can't be used on this machine, or None."""
    if _cuda is None:
        return _import_error
    return None if _cuda.emulated else _no_gpu()


@cache
def _no_gpu() -> str | None:
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA"
    return None if torch.cuda.is_available() else "no GPU that PyTorch can use"


def compiled_for() -> str | None:
    """The architectures, in words, or None if there is no compiled module."""
    return None if _cuda is None else _cuda.architectures


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Tests run every kernel on the CPU, as if it were Hopper's."""
    return (9, 0) if _cuda.emulated else torch.cuda.get_device_capability(device)


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have. CUDA C++ Programming Guide, technical specifications."""
    major, minor = _capability(device)
    if (major, minor) in ((8, 0), (8, 7)):
        return 163 * 1024
    return HOPPER_SHARED if major in (9, 10, 11) else 99 * 1024


@cache
def family(device: torch.device) -> str:
    """Which kernels serve a device.

    Raises:
        ValueError: PSVIT_CUDA_KERNELS names kernels that this build or this GPU doesn't have.
    """
    names = [SM_80]
    own = _cuda.families["apply"] + _cuda.families["attention"]
    if _capability(device) == (9, 0) and HOPPER in own:
        names.append(HOPPER)
    name = os.environ.get("PSVIT_CUDA_KERNELS", names[-1])
    if name not in names:
        raise ValueError(
            f'PSVIT_CUDA_KERNELS: got "{name}", expected what was compiled and this GPU runs: '
            f"{' or '.join(names)}"
        )
    return name


# --- what it serves ---------------------------------------------------------------------------


def supports(op: str, args: tuple) -> str | None:
    reason = missing()
    if reason is not None:
        return reason
    if op not in _SUPPORTS:
        return "no kernel for gradients" if op.endswith("_backward") else "no kernel for this map"
    kernel, main, check = _SUPPORTS[op]
    first: Tensor = args[main]
    device = first.device
    if device.type != ("cpu" if _cuda.emulated else "cuda"):
        return f"device {device.type}, not cuda"
    if first.dtype not in _DTYPES:
        return f"dtype {first.dtype}, not torch.bfloat16 or torch.float16"
    if _capability(device) < MIN_CAPABILITY:
        return f"compute capability {_capability(device)}, below {MIN_CAPABILITY}"
    if family(device) not in _cuda.families[kernel]:
        return f"no kernel for {family(device)} in this build"
    return check(*args)


def _misaligned(name: str, t: Tensor) -> str | None:
    """Of dimensions of size 1 the stride may be anything."""
    beyond = t.data_ptr() % ALIGNMENT
    if beyond:
        return f"{name} starts {beyond} bytes after a multiple of {ALIGNMENT}"
    unit, strides = ALIGNMENT // t.element_size(), t.stride()
    for dim in range(len(strides) - 1):
        if strides[dim] % unit and t.shape[dim] > 1:
            return f"{name} has strides {strides}, not multiples of {unit} elements"
    if (t.shape[-2] - 1) * strides[-2] >= 2**31:
        return f"{name} has heads of 2^31 elements or more"
    return None


def _too_large(*sizes: int) -> str | None:
    """Kernels count rows in 32 bits."""
    rows = 1
    for n in sizes:
        rows *= n
    return f"{rows} rows, 2^31 or more" if rows >= 2**31 else None


def _head_dims(*tensors: Tensor) -> str | None:
    for t in tensors:
        d = t.shape[3]
        if d % 8 or d > MAX_HEAD_DIM:
            return f"head dim {d}, not a multiple of 8 up to {MAX_HEAD_DIM}"
    return None


def _attention_reason(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *rest
) -> str | None:
    if bias is not None:
        return "a bias"
    if not scale >= 0:
        return f"scale {scale}, below 0"
    if k.shape[2] > MAX_TOKENS:
        return f"{k.shape[2]} tokens > {MAX_TOKENS}"
    reason = (
        _head_dims(q, v)
        or _too_large(*q.shape[:3])
        or _misaligned("q", q)
        or _misaligned("k", k)
        or _misaligned("v", v)
    )
    if reason is None and family(q.device) != HOPPER:
        n, d = k.shape[2], max(q.shape[3], v.shape[3])
        needed, most = _cuda.attention_shared(SM_80, n, d), _shared_memory(q.device)
        if needed > most:
            return f"{n} tokens of head dim {d}: {needed} bytes of shared memory > {most}"
    return reason


def _apply_reason(storage: Tensor, v: Tensor, dropout: float) -> str | None:
    if dropout:
        return "dropout"
    b, h, n, d = v.shape
    m, pitch = storage.shape[2:]
    code = _CODES.get(storage.dtype)
    if code is None or (code == "half" and storage.dtype != v.dtype):
        return f"a map of {storage.dtype} for values of {v.dtype}"
    if pitch * storage.element_size() % ALIGNMENT:
        return f"rows of the map of {pitch} elements, not padded to multiples of {ALIGNMENT} bytes"
    reason = (
        _head_dims(v)
        or _too_large(b, h, max(m, n))
        or _misaligned("the map", storage)
        or _misaligned("v", v)
    )
    if reason is None and family(v.device) == HOPPER:
        needed = _cuda.apply_shared(HOPPER, n, d, code)
        if needed > HOPPER_SHARED:
            return f"{n} tokens of head dim {d}: {needed} bytes of shared memory > {HOPPER_SHARED}"
    return reason


def _pool_reason(
    x, residual, grid, prefix, kind, kernel, stride, padding, weight, bias, groups, *norm
):
    b, n, c = x.shape
    if kind == "conv" and not groups == c == weight.shape[0]:
        return "a convolution that is not depthwise"
    if c % 8 or c > MAX_POOL_CHANNELS:
        return f"{c} channels, not a multiple of 8 up to {MAX_POOL_CHANNELS}"
    taps = kernel[0] * kernel[1]
    if kind == "conv" and c * (taps + 1) > MAX_POOL_WEIGHTS:
        return f"{taps} weights for each of {c} channels, over {MAX_POOL_WEIGHTS} in all"
    reason = _too_large(b, n) or _misaligned("x", x)
    return reason if residual is None else reason or _misaligned("residual", residual)


#: For each operation its kernel, the argument that tells device and dtype, and the rest.
_SUPPORTS: dict[str, tuple[str, int, Callable[..., str | None]]] = {
    "attention": ("attention", 0, _attention_reason),
    "attention_quantized": ("attention", 0, _attention_reason),
    "apply_dense": ("apply", 1, lambda p, v, *rest: _apply_reason(p, v, rest[2])),
    "apply_quantized": ("apply", 2, lambda p, s, v, *rest: _apply_reason(p, v, rest[2])),
    "token_pool": ("token_pool", 0, _pool_reason),
}


# --- tensors as the compiled module takes them --------------------------------------------------


def _strided(t: Tensor) -> tuple[int, list[int]]:
    """Address and strides of the first three dimensions, 0 for what there is one of."""
    return t.data_ptr(), [0 if n == 1 else s for n, s in zip(t.shape[:3], t.stride(), strict=False)]


def _tokens(t: Tensor | None) -> tuple[int, int, int]:
    """A (B, N, C) tensor."""
    return (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0), t.stride(1))


def _parameters(x: Tensor, *given: Tensor | None) -> tuple[list[Tensor | None], bool]:
    """In one dtype, that of x if all have it, else float32, and where 16 bytes can be loaded."""
    half = all(t is None or t.dtype is x.dtype for t in given)
    found = [None if t is None else (t if half else t.float()).contiguous() for t in given]
    return [t if t is None or not t.data_ptr() % ALIGNMENT else t.clone() for t in found], half


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _place(device: torch.device) -> tuple[int, int]:
    """Index of the device and address of its current stream."""
    if _cuda.emulated:
        return 0, 0
    # torch.cuda.current_stream makes an object for this number.
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)


# --- operations ---------------------------------------------------------------------------------


def _attend(q, k, v, scale, storage, row_scale):
    """O and the log-sum-exp; the map, if any, is written into its storage."""
    b, h, m, d = q.shape
    n, dv = k.shape[2], v.shape[3]
    out, lse = q.new_empty(b, m, h, dv), q.new_empty(b, h, m, dtype=torch.float32)
    if out.numel():
        _cuda.attention(
            family(q.device), _place(q.device), q.dtype is torch.bfloat16, _CODES[storage.dtype],
            (b, h, m, n, d, dv), scale, _strided(q), _strided(k), _strided(v), out.data_ptr(),
            storage.data_ptr(), storage.shape[-1], _address(row_scale), lse.data_ptr(),
        )  # fmt: skip
    return out, lse


def attention(q, k, v, bias, scale, dense_map):
    pitch = row_pitch(k.shape[2], q.element_size())
    storage = q.new_empty(*q.shape[:3], pitch) if dense_map else q.new_empty(0)
    out, lse = _attend(q, k, v, scale, storage, None)
    return out, storage, lse


def attention_quantized(q, k, v, bias, scale, code):
    codes = q.new_empty(*q.shape[:3], row_pitch(k.shape[2], 1), dtype=code)
    row_scale = q.new_empty(q.shape[:3], dtype=torch.float32)
    out, lse = _attend(q, k, v, scale, codes, row_scale)
    return out, codes, row_scale, lse


def _apply(storage, row_scale, v, head_index, correction):
    b, h, n, d = v.shape
    map_batch, map_heads, m, pitch = storage.shape
    out = v.new_empty(b, m, h, d)
    if out.numel():
        index = None if head_index is None else donors(tuple(head_index), v.device)
        correction = None if correction is None else correction.float().contiguous()
        _cuda.apply(
            family(v.device), _place(v.device), v.dtype is torch.bfloat16, _CODES[storage.dtype],
            (b, h, m, n, d, map_batch, map_heads), _strided(storage), pitch,
            (0, (0, 0, 0)) if row_scale is None else _strided(row_scale), _strided(v),
            out.data_ptr(), _address(index), _address(correction),
        )  # fmt: skip
    return out


def apply_dense(map_storage, v, head_index, correction, dropout, seed, links):
    return _apply(map_storage, None, v, head_index, correction)


def apply_quantized(codes, row_scale, v, head_index, correction, dropout, seed, links):
    return _apply(codes, row_scale, v, head_index, correction)


def token_pool(
    x, residual, grid, prefix, kind, kernel, stride, padding, weight, bias, groups,
    norm_weight, norm_bias, norm_eps,
):  # fmt: skip
    b, _, c = x.shape
    new_grid = pooled_grid(grid, kernel, stride, padding)
    out = x.new_empty(b, prefix + new_grid[0] * new_grid[1], c)
    if out.numel():
        parameters, half = _parameters(x, weight, bias, norm_weight, norm_bias)
        _cuda.token_pool(
            family(x.device), _place(x.device), x.dtype is torch.bfloat16, kind, (b, c, prefix),
            (*grid, *new_grid), (*kernel, *stride, *padding), _tokens(x), _tokens(residual),
            out.data_ptr(), half, [_address(t) for t in parameters], norm_eps,
        )  # fmt: skip
    return out
