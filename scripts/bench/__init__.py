"""Benchmarks: how fast each thing is, beside its limit and its peers; `harness` is what they share."""
