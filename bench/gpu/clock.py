"""Time on a CUDA device, and what else only the device can tell.

The session knows no more of a device than this class has; another one stands in for it in tests.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

#: Microseconds of one call.
Sampler = Callable[[], float]

#: A captured sample moves this many times the cache, so that what it costs to start a graph, and
#: what the last call leaves in the cache unwritten, is small beside it.
CACHES_PER_SAMPLE = 16

#: Calls in a sample: two sets of inputs at least, so that none meets itself in the cache.
FEWEST, MOST = 2, 32

#: What a profile holds of a device besides what was launched on it.
NOT_LAUNCHED = {"Context Sync", "Event Sync", "Stream Sync", "Stream Wait Event"}

#: Seconds that a sample on the wall clock takes at least; waiting for the device is in it once.
WALL_SECONDS = 2e-3


class CudaClock:
    """Samples of calls on distinct sets of inputs, with a cold cache."""

    name = "cuda"

    def __init__(self) -> None:
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        # Eight times the cache. Lines that were only read leave it without being written to memory
        # meanwhile; and while it is read, there is time to launch what is timed.
        self._large = torch.ones(2 * self.cache_bytes, dtype=torch.float32, device="cuda")
        self._stream = torch.cuda.Stream()

    def sets(self, nbytes: float) -> int:
        """Of inputs, for calls that move so many bytes."""
        enough = math.ceil(CACHES_PER_SAMPLE * self.cache_bytes / nbytes)
        return min(max(enough, FEWEST), MOST)

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Compiles, tunes and allocates, on the stream that captures."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                calls[0]()
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()

    def captured(self, calls: Sequence[Call]) -> Sampler:
        """Of one graph with all calls in it: what the device takes, without Python.

        What the calls give stays alive, so that each writes memory of its own.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                results = [call() for call in calls]
        except Exception:
            torch.cuda.set_stream(stream)  # where ending the capture raises, it stays entered
            raise
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            self._large.sum()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return 1e3 * start.elapsed_time(end) / len(results)

        sample()
        return sample

    def wall(self, calls: Sequence[Call]) -> Sampler:
        """Of a loop over all calls: what a program that doesn't capture waits for."""

        def seconds(loops: int) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for call in itertools.chain.from_iterable(itertools.repeat(calls, loops)):
                call()
            torch.cuda.synchronize()
            return time.perf_counter() - start

        seconds(1)
        loops = math.ceil(WALL_SECONDS / seconds(1))
        return lambda: 1e6 * seconds(loops) / (loops * len(calls))

    def peak_bytes(self, call: Call) -> int:
        """Most that PyTorch's allocator holds for one call beyond its inputs."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Call) -> list[str]:
        """Kernels, copies and fills of one call, by name, in order."""
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        events = seen.events() or []
        return [
            event.name
            for event in sorted(events, key=lambda event: event.time_range.start)
            if event.device_type == DeviceType.CUDA
            and not event.is_user_annotation
            and event.name not in NOT_LAUNCHED
        ]

    def check_health(self) -> None:
        """Raises where an earlier error has left the device or its random numbers unusable."""
        torch.cuda.synchronize()
        torch.randn(1, device="cuda").item()

    def release(self) -> None:
        """Gives back what the last case held."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
