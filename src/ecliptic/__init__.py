"""Ecliptic: published methods around CLIP on one model object, one trainer, one command line.

Importing this package is cheap: torch and transformers load with the first model, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "methods"]

if TYPE_CHECKING:
    from ecliptic.core.encoder import load as load
    from ecliptic.core.method import cards as methods

_LAZY = {"load": ("ecliptic.core.encoder", "load"), "methods": ("ecliptic.core.method", "cards")}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ecliptic' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
