"""Applying a stored map, against a product with it, eager attention and SDPA."""

CASES = "apply*"


def test_apply(benchmark, call):
    benchmark(call)
