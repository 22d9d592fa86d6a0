"""Attention mechanisms: one folder each, a dense oracle, a linear-memory path and kernels behind one function."""
