"""Matching and merging tokens, against plain PyTorch."""

CASES = "merge/*"


def test_merging(benchmark, call):
    benchmark(call)
