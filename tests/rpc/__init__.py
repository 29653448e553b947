"""Handlers as they are compiled, names and calls, without a connection."""
