"""Benchmarks and experiments of mmicl_kernels; run from a checkout, never installed."""
