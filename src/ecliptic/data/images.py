"""Open any picture as RGB, or say clearly why not.

Real folders hold truncated downloads, HTML pages named .jpg, animations, CMYK prints, 16-bit scans and files of zero
bytes. Each is either turned into an upright 8-bit RGB picture or refused with one exception, `ImageError`, which names
the file and the reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image, ImageOps, PngImagePlugin

from ecliptic.core.inputs import shrink_on_load

EXTENSIONS = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".icns", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".sgi", ".tga", ".tif", ".tiff", ".webp"}
)
"""File names that `is_image` and `find_images` take for pictures, lower case."""

MAX_PIXELS = 89_478_485
"""Default limit on width x height: Pillow's own (a quarter of a gigabyte of RGB), against decompression bombs."""

_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM", "MPO", "JPEG2000", "ICO", "CUR", "ICNS"),
    *("TGA", "PCX", "DCX", "SGI", "PSD", "QOI", "DDS"),
)  # decoders that stay inside Pillow: EPS would start Ghostscript, WMF the window system

_log = logging.getLogger(__name__)


class Readable(Protocol):
    """An open binary file, or anything else with a `read` (its `name`, if it has one, is used in messages)."""

    def read(self) -> bytes: ...


Source = str | Path | bytes | Readable | Image.Image
"""What can be opened: a path, the encoded bytes, something to read from, or a picture already in memory."""


class ImageError(ValueError):
    """This picture cannot be used. `path`: which one (a placeholder for unnamed bytes); `reason`: why, for the user."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_image(source: Source, *, fast: bool = False, min_side: int = 224, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`source` as an upright 8-bit RGB picture; `ImageError` if that cannot be had.

    Applied: EXIF orientation; alpha composited on white; palette, CMYK, Lab and grey to RGB; 16-bit grey divided by
    257; 32-bit integer and float grey scaled (see `to_rgb`); the first frame of an animation. Colour profiles are
    ignored.
    fast: let the JPEG decoder shrink by 2, 4 or 8 while both sides stay >= `min_side`; several times faster on large
        photographs, pixels differ slightly from a full decode. A larger 8-bit PNG (up to 1.4 gigapixels) is read in
        strips and shrunk until it fits. Nothing else is affected.
    max_pixels: refuse pictures with more (after shrinking); Pillow's global limit plays no part.
    """
    return open_with_alpha(source, fast=fast, min_side=min_side, max_pixels=max_pixels)[0]


def open_with_alpha(
    source: Source, *, fast: bool = False, min_side: int = 224, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, Image.Image | None]:
    """`open_image` and the alpha channel it composited with ("L", 0 = transparent), or None where there is none."""
    if isinstance(source, Image.Image):
        return _finish(source, getattr(source, "filename", "") or "<image in memory>")
    name, handle = _open(source)
    with handle:
        image = _identify(handle, name)
        if fast:
            shrink_on_load(image, min_side)
        pixels = image.width * image.height
        try:
            if fast and image.format == "PNG" and max_pixels < pixels <= 16 * max(max_pixels, MAX_PIXELS):
                image = _shrunk_png(handle, math.ceil(math.sqrt(pixels / max_pixels)))
            elif pixels > max_pixels:
                size = f"{image.width} x {image.height} is {pixels:,} pixels"
                raise ImageError(name, f"{size}, above the limit of {max_pixels:,} (raise max_pixels)")
            image.load()
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(name, _why_broken(error)) from error
        return _finish(image, name)


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB copy of a decoded picture, alpha on white; no metadata, so nobody rotates it twice.

    16-bit grey is divided by 257 (its full range; a 12-bit scan stays dark). 32-bit integers: values within 0..255 are
    taken as 8-bit, within 0..65535 as 16-bit, else stretched from minimum to maximum. Floats: within 0..1 times 255,
    within 0..255 as they are, else stretched; NaN and infinities become black and are left out of the stretch.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _grey_to_8_bit(image)
    if image.mode == "La":  # premultiplied: the only mode that Pillow takes to RGB by a detour only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    image = image.convert("RGB")
    image.info = {}
    return image


def is_image(path: str | Path) -> bool:
    """True if the name looks like a picture's; the content is not read."""
    return Path(path).suffix.lower() in EXTENSIONS


def find_images(folder: str | Path, on_error: Callable[[Path, str], None] | None = None) -> list[Path]:
    """All pictures (by name) in `folder` and its sub-folders, sorted by path.

    Hidden files and folders are skipped. Links to folders are followed, but no folder is read twice, so loops end.
    What cannot be read is passed to `on_error(path, reason)` (default: a warning in the log); the walk goes on. Raises
    FileNotFoundError, NotADirectoryError or PermissionError for `folder` itself.
    """
    top = Path(folder)
    if not top.exists():
        raise FileNotFoundError(f"no such folder: {top}")
    if not top.is_dir():
        raise NotADirectoryError(f"{top} is a file, not a folder of images")
    report = on_error or (lambda path, reason: _log.warning("%s: %s", path, reason))
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    real, links = [top], list[Path]()
    while real or links:  # links last: a folder is listed under its own name if it has one inside the tree
        here = real.pop() if real else links.pop(0)
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            reason = f"cannot read this folder: {error.strerror or error}"
            if here == top:
                raise PermissionError(f"{here}: {reason}") from error
            report(here, reason)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = here / entry.name
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else real).append(path)
                elif is_image(entry.name):
                    if entry.is_file():
                        found.append(path)
                    else:
                        report(path, "a broken link" if entry.is_symlink() else "not a regular file")
            except OSError as error:
                report(path, f"cannot be read: {error.strerror or error}")
    return sorted(found)


def _open(source: str | Path | bytes | Readable) -> tuple[str, IO[bytes]]:
    """A seekable binary file and its name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        if not source:
            raise ImageError("<bytes>", "empty (0 bytes)")
        return f"<{len(source)} bytes>", io.BytesIO(source)
    if hasattr(source, "read"):
        name = str(getattr(source, "name", None) or "<file>")
        try:
            data = source.read()
        except Exception as error:
            raise ImageError(name, f"cannot be read: {error}") from error
        if not isinstance(data, bytes):
            raise ImageError(name, "opened as text; open it with mode 'rb'")
        if not data:
            raise ImageError(name, "empty (0 bytes)")
        return name, io.BytesIO(data)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"<{type(source).__name__}>", "not a path, bytes, binary file or PIL image")
    name = str(source)
    if "://" in name[:12]:
        raise ImageError(name, "a web address, not a file: download it first")
    try:
        kind = Path(source).stat()
        if stat.S_ISDIR(kind.st_mode):
            raise ImageError(name, "a folder, not an image")
        if not stat.S_ISREG(kind.st_mode):  # a pipe would block for ever
            raise ImageError(name, "not a regular file")
        if kind.st_size == 0:
            raise ImageError(name, "empty (0 bytes)")
        return name, Path(source).open("rb")
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(name, "no such file") from error
    except PermissionError as error:
        raise ImageError(name, "permission denied") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(name, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _identify(handle: IO[bytes], name: str) -> Image.Image:
    """The picture's header, by the first decoder that takes it.

    This is the core of `Image.open` without its size check, which warns or raises by a global limit.
    """
    try:
        Image.init()
        start = handle.read(16)
        for format in _FORMATS:
            if format not in Image.OPEN:  # AVIF and JPEG 2000 may be missing from a build of Pillow
                continue
            factory, accepts = Image.OPEN[format]
            accepted = accepts is None or accepts(start)
            if accepted and not isinstance(accepted, str):
                handle.seek(0)
                with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # "not mine", to Pillow
                    return factory(handle, name)
    except Exception as error:  # plugins raise nearly anything on hostile input
        raise ImageError(name, _why_unknown(handle, error)) from error
    raise ImageError(name, _why_unknown(handle))


_STRIP = 4 << 20  # bytes of a huge PNG decoded at a time


def _shrunk_png(handle: IO[bytes], factor: int) -> Image.Image:
    """A PNG at 1/factor of its size, decoded strip by strip, so that the whole never stands in memory.

    A row of a PNG is stored as its difference to the row above. Each strip is therefore handed to Pillow as a picture of
    its own with the last row of the strip before, undone, on top.
    """
    handle.seek(8)
    kept = b""  # palette and transparent colour
    while True:
        length, kind = struct.unpack(">I4s", handle.read(8))
        if kind == b"IDAT":
            break
        data = handle.read(length + 4)
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[:13])
        elif kind in (b"PLTE", b"tRNS"):
            kept += struct.pack(">I4s", length, kind) + data
    if depth != 8 or interlaced:
        raise ValueError(
            f"{width} x {height} pixels at {depth} bits{' interlaced' if interlaced else ''}: too large to shrink"
        )
    row = width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    strip = max(1, _STRIP // (row * factor)) * factor
    stream = zlib.decompressobj()
    raw, above = bytearray(), bytes(row)
    canvas: Image.Image | None = None
    done = 0
    while done < height:
        rows = min(strip, height - done)
        while len(raw) < rows * (row + 1):
            if length == 0:
                handle.read(4)  # the checksum of the chunk
                length, kind = struct.unpack(">I4s", handle.read(8))
                if kind != b"IDAT":
                    raise ValueError("the image file is truncated")
                continue
            part = handle.read(min(length, 1 << 12))
            if not part:
                raise ValueError("the image file is truncated")
            length -= len(part)
            raw += stream.decompress(part)
        block = b"\0" + above + bytes(raw[: rows * (row + 1)])
        del raw[: rows * (row + 1)]
        header = struct.pack(">IIBBBBB", width, rows + 1, depth, colour, 0, 0, 0)
        chunks = _chunk(b"IHDR", header) + kept + _chunk(b"IDAT", zlib.compress(block, 0)) + _chunk(b"IEND", b"")
        piece = PngImagePlugin.PngImageFile(io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunks))
        above = piece.crop((0, rows, width, rows + 1)).tobytes()
        plain = piece.convert("RGBA" if piece.has_transparency_data else "RGB")
        if canvas is None:
            canvas = Image.new(plain.mode, (-(-width // factor), -(-height // factor)))
        canvas.paste(plain.reduce(factor, (0, 1, width, rows + 1)), (0, done // factor))
        done += rows
    assert canvas is not None
    return canvas


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def _finish(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Upright, RGB, and the alpha channel if there is one."""
    try:
        image = _upright(image)
        if image.has_transparency_data and not image.mode.startswith("I;16"):
            return to_rgb(image), image.convert("LA" if image.mode == "La" else "RGBA").getchannel("A")
        return to_rgb(image), None
    except Exception as error:
        raise ImageError(name, _why_broken(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Metadata too damaged to read is no reason to refuse the picture."""
    try:
        if image.getexif().get(0x0112, 1) in range(2, 9):
            return ImageOps.exif_transpose(image)
    except Exception as error:
        _log.debug("ignoring unreadable EXIF data: %s", error)
    return image


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    import numpy as np

    values: Any = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif image.mode == "I" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (np.where(finite, values, low) - low) / max(high - low, 1e-300) * 255
    return Image.fromarray(np.where(finite, np.rint(scaled), 0).astype(np.uint8))


def _why_broken(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):  # from within a plugin
        return f"too large to decode safely: {error}"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = str(error) or type(error).__name__
    return f"truncated: {text}" if "truncated" in text.lower() else f"corrupt: {text}"


_MAGIC = (
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"%!PS", "a PostScript drawing, which is not supported"),
    (b"\x7fELF", "a program"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"ID3", "an MP3 recording"),
    (b"OggS", "an Ogg recording"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the real file with `git lfs pull`"),
)


def _why_unknown(handle: IO[bytes], error: Exception | None = None) -> str:
    """Say what a file is that no decoder knows."""
    try:
        handle.seek(0)
        head = handle.read(1024)
    except Exception as trouble:
        return f"cannot be read: {trouble}"
    for magic, meaning in _MAGIC:
        if head.startswith(magic):
            return f"not an image: {meaning}"
    if head[4:8] == b"ftyp":
        kind = head[8:12].decode("latin-1")
        return (
            f"not a supported image: {'HEIC' if kind[:3] in ('hei', 'hev', 'mif') else 'an MP4-family'} file ({kind})"
        )
    lower = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lower.startswith((b"<svg", b"<?xml")) and b"<svg" in lower:
        return "an SVG drawing, which is not supported: convert it to PNG first"
    if lower.startswith((b"<!doctype html", b"<html")):
        return "not an image: an HTML page"
    if not head.strip(b"\0"):
        return "not an image: nothing but zero bytes"
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        return "not an image: plain text"
    if error is None:
        return "not an image that Pillow knows, or its header is damaged"
    return _why_broken(error)
