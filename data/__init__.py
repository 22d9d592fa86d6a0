"""Readers, downloads and samplers: raw files in, batches of bytes out. Imports nothing else of ours."""
