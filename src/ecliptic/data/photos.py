"""The pictures inside scikit-image and scikit-learn, described by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ecliptic.data.debian import SourceUnavailable
from ecliptic.data.records import Records, decode_image
from ecliptic.data.textiles import package_data

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record

_PHOTOS = {
    "astronaut": ("astronaut.png", "a smiling astronaut in an orange space suit with a flag and a model space shuttle"),
    "brick wall": ("brick.png", "a brick wall in black and white"),
    "photographer": ("camera.png", "a man in a dark coat looking through a camera on a tripod, in black and white"),
    "cell": ("cell.png", "a single round cell under the microscope"),
    "cat": ("chelsea.png", "the face of a tabby cat with green eyes"),
    "clock": ("clock_motion.png", "a wall clock blurred by motion"),
    "coffee cup": ("coffee.png", "a cup of espresso on a red saucer with a spoon on a wooden table"),
    "coins": ("coins.png", "four rows of ancient coins on a dark background"),
    "grass": ("grass.png", "grass and small leaves seen from above, in black and white"),
    "gravel": ("gravel.png", "a surface of gravel stones, in black and white"),
    "horse": ("horse.png", "the black silhouette of a standing horse"),
    "galaxies": ("hubble_deep_field.jpg", "hundreds of distant galaxies in the dark sky, seen by a space telescope"),
    "tissue": ("ihc.png", "stained tissue under the microscope with brown glands and blue cell nuclei"),
    "blood vessels": ("microaneurysms.png", "small blood vessels in a close view of a retina, in grey"),
    "moon": ("moon.png", "the surface of the moon with craters"),
    "motorcycle": ("motorcycle_left.png", "a red motorcycle parked in a garage in front of shelves"),
    "page of text": ("page.png", "a photographed page of printed text about region-based segmentation"),
    "retina": ("retina.jpg", "the retina of a human eye with its blood vessels and the optic disc"),
    "rocket": ("rocket.jpg", "a white rocket standing on its launch pad between towers at dusk"),
    "handwriting": ("text.png", "handwritten formulas on paper, seen at an angle"),
    "temple": ("china.jpg", "a Chinese temple tower with several roofs above trees and a lake"),
    "flower": ("flower.jpg", "an orange dahlia flower in front of dark leaves"),
}  # label: (file, caption); the last two are scikit-learn's

_EXTRAS = {
    "chessboard": ("chessboard_GRAY.png", "a black and white chessboard pattern"),
    "colour wheel": ("color.png", "a wheel of all colours on black"),
    "logo": ("logo.png", "a round logo with a snake in green and orange"),
    "phantom": ("phantom.png", "a drawing of ellipses that stands for a slice through a head"),
}


def photos(*, extras: bool = False) -> Records:
    """22 pictures with a caption and a label each, no two alike; all photographs but the horse, a silhouette.

    extras: also four drawings and patterns (chessboard, colour wheel, logo, head phantom).
    Only files inside the installed packages are used: nothing is imported and nothing downloaded.
    """
    table = {**_PHOTOS, **(_EXTRAS if extras else {})}
    folders = (
        package_data("skimage", "scikit-image") / "data",
        package_data("sklearn", "scikit-learn") / "datasets" / "images",
    )
    rows = [(label, _find(name, folders), caption) for label, (name, caption) in table.items()]

    def get(i: int) -> Record:
        label, path, caption = rows[i]
        return {"id": f"photos/{path.stem}", "image": str(path), "caption": caption, "label": label}

    return Records(len(rows), get, load=decode_image, name="photos")


def _find(name: str, folders: tuple[Path, ...]) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise SourceUnavailable(f"{name} is in neither {folders[0]} nor {folders[1]}: pip install 'scikit-image>=0.26'")
