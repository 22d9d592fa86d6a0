"""Attention mechanisms: one folder each, with a dense oracle and a linear-memory path behind one function."""
