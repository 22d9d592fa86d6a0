"""Architectures, each written once; the attention mechanism is handed in."""
