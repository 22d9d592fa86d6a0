"""Typed configuration: schema, checks, composition and the command-line wrapper; the YAML groups lie beside it."""
