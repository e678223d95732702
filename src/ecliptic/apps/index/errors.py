"""What can go wrong with an index, each with the sentence a user needs."""

from __future__ import annotations


class IndexProblem(Exception):
    """Base of all of them; its text is meant for the user."""


class NoIndexError(IndexProblem):
    """The folder holds no index."""


class OtherModelError(IndexProblem):
    """The index was built with another model or another image transform, so its vectors cannot be compared."""


class IndexBusyError(IndexProblem):
    """Another process is writing."""


class DiskFullError(IndexProblem):
    """No space was left; what had been committed before is intact."""


class DamagedIndexError(IndexProblem):
    """The vector file is shorter than the catalogue says, or the catalogue cannot be read."""


class DamagedGraphWarning(UserWarning):
    """The graph for fast search cannot be read; search compares with every row instead."""


class SlowSearchWarning(UserWarning):
    """The index is large enough for a graph, but faiss is not installed."""
