"""Search for a schedule and widths: a supernet of all candidates, then evolution."""
