"""Thin applications over the library: the search index, the command line, the demonstration."""
