"""How pictures are named where the user says nothing about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder


def usual_templates(encoder: HFEncoder) -> str:
    """The template set for labels: "photo", as CLIP's and SigLIP's text towers read captions of photographs; but "plain" for
    `offline`, whose sentence encoder never did. Of 229 photographs it names 62 % right by the bare name and 57 % by "a photo of
    ..." (benchmarks/offline_photos.py)."""
    return "plain" if encoder.name == "offline" else "photo"
