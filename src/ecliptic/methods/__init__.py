"""One file per published method: `<stage>/<slug>.py`. The folders are the catalogue; no list names them.

`ecliptic.methods()` lists the cards. Importing a method binds this package to that same name, so the package answers
the call too.
"""

from __future__ import annotations

import sys
from types import ModuleType

from ecliptic.core.method import Card, cards


class _Catalogue(ModuleType):
    def __call__(self) -> list[Card]:
        return cards()


sys.modules[__name__].__class__ = _Catalogue
