"""``python -m bench.gpu --out DIR``: every row of the GPU table, correctness first."""
