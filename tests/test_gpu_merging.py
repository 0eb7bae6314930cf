"""A pass that merges tokens never waits for the device: it is captured in a CUDA graph, whole."""

from __future__ import annotations

from collections.abc import Callable

import hosts
import pytest
import torch
from inputs import normal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import psvit
import psvit_kernels as pk
from psvit.slimming import evit, evo_vit
from psvit_kernels import reference

pytest.importorskip("timm")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

MERGING = {
    "merged": ("AAAA", {"merge": 6}),
    "merged, some protected": ("AAAA", {"merge": 6, "protect": 0.1}),
    "merged, map carried over": ("ASSS", {"merge": (6, 0, 5, 4)}),
    "pooled and merged": ("AA|AA", {"merge": 2, "size_bias": True}),
    "both, map carried over": ("AA|SS", {"merge": 2, "size_bias": True, "pool": "avg"}),
}
CHOOSING = {
    "evit": lambda model: evit(model, layers=(2, 3)),
    "evo_vit": lambda model: evo_vit(model, layers=(2, 3)),
}


def host() -> nn.Module:
    """Its heads are such as every kernel takes."""
    return hosts.timm_vit(embed_dim=96)


def converted(name: str) -> nn.Module:
    if name in CHOOSING:
        return CHOOSING[name](host())
    schedule, options = MERGING[name]
    return psvit.accelerate(host(), schedule, **options)


# --- without a GPU ----------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes what on a GPU would wait for the device, or bring data to it from the host.

    Also in the reference of what merges, which serves there what no kernel serves.
    """

    INSIDE = ("match_tokens", "merge_tokens", "reduce_map")

    WAITING = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITING or masks:
            self.seen.append(str(func))
        if name in self.INSIDE:
            with self:
                return getattr(reference, name)(*args)
        return func(*args, **(kwargs or {}))


def test_what_would_wait_is_noticed():
    with Watch() as watch:
        x = torch.tensor([1.0, -1.0])
        assert x[x > 0].sum().item() == 1
    assert watch.seen[0] == "aten.lift_fresh.default" and len(watch.seen) >= 3, watch.seen


@pytest.mark.parametrize("name", MERGING)
def test_nothing_comes_from_the_host_after_the_first_pass(name):
    fast = converted(name)
    with torch.no_grad():
        fast(hosts.images())
        with Watch() as watch:
            fast(hosts.images())
    assert not watch.seen


@pytest.mark.parametrize("name", ["pooled and merged", "both, map carried over"])
def test_what_no_image_changes_is_constant_to_a_compiler(name):
    graphs = []

    def record(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    fast, x = converted(name), hosts.images()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend=record)
        torch.testing.assert_close(compiled(x), fast(x), rtol=0, atol=2e-5)
    (targets,) = graphs
    made = [t for t in targets if "method tensor " in t or "method eye " in t or t == "nonzero"]
    assert not made and any("match_tokens" in t for t in targets)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_images_of_several_sizes_compile_whole():
    model = hosts.timm_vit(dynamic_img_size=True, depth=2)
    fast = psvit.accelerate(model, "A|S", pool="avg", merge=2)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for side in (16, 24):
            x = hosts.images(2, 3, side, side)
            torch.testing.assert_close(compiled(x), fast(x), rtol=0, atol=2e-5)


# --- on a GPU -----------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def replayed(run: Callable[..., tuple[Tensor, ...]], old: list[Tensor], new: list[Tensor]):
    """What a graph of ``run(*old)`` gives once the new are where the old were, and what it gave."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(*old)
    torch.cuda.current_stream().wait_stream(stream)
    before = run(*old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*old)
    for place, tensor in zip(old, new, strict=True):
        place.copy_(tensor)
    graph.replay()
    return out, before


def assert_replayed(run: Callable[..., tuple[Tensor, ...]], *made: Callable[[], Tensor]) -> None:
    """With other inputs a graph gives what a call gives."""
    __tracebackhide__ = True
    old, new = ([make().cuda() for make in made] for _ in range(2))
    with torch.no_grad():
        want = run(*new)
        got, before = replayed(run, old, new)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda m, i=i: f"{i}: {m}")
    assert not torch.equal(got[0], before[0]), "the inputs make no difference"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_are_captured(dtype):
    def run(x: Tensor, keys: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        match = pk.match_tokens(keys, 13, prefix=1)
        merged = pk.merge_tokens(x, match, residual=x)
        groups = pk.TokenGroups.of(match, None, merged.sizes)
        return (
            *match,
            merged.tokens,
            merged.sizes,
            pk.DenseMap.from_dense(p).reduce(groups).dense(),
        )

    shapes = [(1, 197, 384), (1, 6, 197, 64), (1, 6, 197, 197)]
    assert_replayed(run, *(lambda s=shape: normal(*s, dtype=dtype) for shape in shapes))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*MERGING, *CHOOSING])
def test_a_converted_model_is_captured(name, batch):
    fast = converted(name).cuda()
    assert_replayed(lambda x: (fast(x),), lambda: hosts.images(batch, 3, 32, 32))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", MERGING)
def test_a_compiled_model_is_captured_and_compiled_once(name):
    fast = converted(name).cuda()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(fast, fullgraph=True, dynamic=False, backend=counter)
    assert_replayed(lambda x: (compiled(x),), lambda: hosts.images(1, 3, 32, 32))
    assert counter.frame_count == 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", MERGING)
def test_nothing_waits_for_the_device(name):
    fast, x = converted(name).cuda(), hosts.images(1, 3, 32, 32).cuda()
    with torch.no_grad():
        want = fast(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
