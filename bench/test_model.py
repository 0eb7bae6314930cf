"""A whole DeiT-S, converted and not."""

CASES = "deit_small*"


def test_model(benchmark, call):
    benchmark.pedantic(call, rounds=11, warmup_rounds=2)
