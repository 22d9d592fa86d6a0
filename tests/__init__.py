"""Tests: the tree mirrors the packages; shared fixtures in conftest.py, shared functions in helpers.py."""
