"""Typed configuration: schema, checks, composition, the command line; the YAML groups lie beside it."""
