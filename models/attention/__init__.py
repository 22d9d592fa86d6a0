"""Attention mechanisms as modules: projections, positions and one kernel call each."""
