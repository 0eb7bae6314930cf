"""Softmax attention that also hands out its map, against eager attention and SDPA."""

CASES = "attention/*"


def test_attention(benchmark, call):
    benchmark(call)
