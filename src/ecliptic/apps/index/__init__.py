"""A picture index in one folder: vectors in a memory-mapped fp16 file, everything else in SQLite; or a LanceDB table.

Opening and searching need numpy alone; only text and picture queries, and adding, need a model.
"""

from ecliptic.apps.index.errors import (
    DamagedGraphWarning,
    DamagedIndexError,
    DiskFullError,
    IndexBusyError,
    IndexProblem,
    NoIndexError,
    OtherModelError,
    SlowSearchWarning,
)
from ecliptic.apps.index.index import Change, Check, Hit, Index
from ecliptic.apps.index.lance import is_lance
from ecliptic.apps.index.store import Signature

__all__ = [
    "Change",
    "Check",
    "DamagedGraphWarning",
    "DamagedIndexError",
    "DiskFullError",
    "Hit",
    "Index",
    "IndexBusyError",
    "IndexProblem",
    "NoIndexError",
    "OtherModelError",
    "Signature",
    "SlowSearchWarning",
    "is_lance",
]
