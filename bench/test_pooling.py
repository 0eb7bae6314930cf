"""Token pooling, against the way through NCHW and back."""

CASES = "pool-*"


def test_pooling(benchmark, call):
    benchmark(call)
