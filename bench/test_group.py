"""Forward and backward of one layer that attends and two that share its map."""

CASES = "group*"


def test_group(benchmark, call):
    benchmark(call)
