"""Every kind of picture a real folder holds, made here, and what becomes of it."""

import contextlib
import io
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from ecliptic.data import images
from ecliptic.data.images import ImageError, find_images, is_image, open_image, open_with_alpha, to_rgb


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def refused(source: object, *words: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


# handled


def test_plain_picture_is_unchanged_and_carries_no_metadata(tmp_path: Path) -> None:
    picture = noise()
    path = tmp_path / "a.png"
    picture.save(path)
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), picture):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert type(opened) is Image.Image
        assert opened.info == {}
        assert np.array_equal(np.asarray(opened), np.asarray(picture))
    assert opened is not picture


def test_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(noise(), "PNG"))
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(noise()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(orientation: int, format: str) -> None:
    # The upright picture is red at the top left and blue at the bottom right; how EXIF says it is stored, by hand.
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste("red", (0, 0, 12, 8))
    upright.paste("blue", (28, 12, 40, 20))
    array = np.asarray(upright)
    stored = {
        1: array,
        2: array[:, ::-1],  # mirrored left to right
        3: array[::-1, ::-1],  # half a turn
        4: array[::-1],  # mirrored top to bottom
        5: array.transpose(1, 0, 2),  # mirrored along the diagonal
        6: np.rot90(array, 1),  # shown after a quarter turn clockwise, so stored a quarter turn the other way
        7: array[::-1, ::-1].transpose(1, 0, 2),  # mirrored along the other diagonal
        8: np.rot90(array, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif.tobytes()))
    assert opened.size == (40, 20)
    assert pixel(opened, 4, 3)[0] > 200
    assert pixel(opened, 4, 3)[2] < 60
    assert pixel(opened, 36, 17)[2] > 200
    assert pixel(opened, 36, 3)[1] > 200
    assert open_image(opened).size == (40, 20)  # nothing left that would turn it again


def test_damaged_exif_is_ignored() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image(data).size == (64, 48)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(format: str) -> None:
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(255, 0, 0, 255), (0, 0, 255, 0), (0, 0, 0, 128)])
    options: dict[str, object] = {"lossless": True, "exact": True} if format == "WEBP" else {}
    opened, alpha = open_with_alpha(encoded(picture, format, **options))
    assert [pixel(opened, x) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (127, 127, 127)]
    assert alpha is not None
    assert [alpha.getpixel((x, 0)) for x in range(3)] == [255, 0, 128]


def test_grey_with_alpha_and_no_alpha() -> None:
    picture = Image.new("LA", (2, 1))
    picture.putdata([(10, 255), (10, 0)])
    opened = open_image(encoded(picture, "PNG"))
    assert [pixel(opened, x) for x in range(2)] == [(10, 10, 10), (255, 255, 255)]
    assert open_with_alpha(noise())[1] is None


def test_palette_with_a_transparent_colour() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 200, 0, 9, 9, 9] + [0] * 762)
    picture.putdata([0, 1])
    for format in ("PNG", "GIF"):
        opened = open_image(encoded(picture, format, transparency=1))
        assert [pixel(opened, x) for x in range(2)] == [(0, 200, 0), (255, 255, 255)]


def test_rgb_png_with_a_transparent_colour() -> None:
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (9, 9, 9))
    opened = open_image(encoded(picture, "PNG", transparency=(9, 9, 9)))
    assert [pixel(opened, x) for x in range(2)] == [(1, 2, 3), (255, 255, 255)]


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert pixel(open_image(data)) == (255, 0, 0), format


def test_cmyk_jpeg_and_tiff() -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    for format in ("JPEG", "TIFF"):
        red, green, blue = pixel(open_image(encoded(picture, format)), 8, 8)
        assert red > 240
        assert green < 15
        assert blue < 15


def test_lab_tiff() -> None:
    picture = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (255, 128, 128)])  # L* 100, a* b* 0: white
    red, green, blue = pixel(open_image(encoded(picture, "TIFF")))
    assert min(red, green, blue) > 245


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        opened = open_image(encoded(Image.fromarray(values), format))
        assert [pixel(opened, x)[0] for x in range(6)] == [0, 0, 1, 1, 128, 255]  # v / 257, rounded
    assert open_with_alpha(Image.fromarray(values))[1] is None


def png_16_bit_rgb(rows: np.ndarray) -> bytes:
    """A 16-bit colour PNG by hand: Pillow cannot write one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = rows.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_16_bit_colour() -> None:
    opened = open_image(png_16_bit_rgb(np.array([[[65535, 32896, 0]]])))
    assert pixel(opened) == (255, 128, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-10.0, 0.0, 10.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.0, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 50_000, 100_000]], np.int32), [0, 128, 255]),
        (np.full((1, 3), 7_000_000, np.int32), [0, 0, 0]),
    ],
)
def test_32_bit_grey(values: np.ndarray, expected: list[int]) -> None:
    opened = open_image(encoded(Image.fromarray(values), "TIFF"))
    assert [pixel(opened, x)[0] for x in range(3)] == expected


def test_one_bit() -> None:
    assert pixel(open_image(encoded(Image.new("1", (2, 2), 1), "PNG"))) == (255, 255, 255)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "La", "RGBa", "PA"]
)
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


# fast mode


def test_fast_keeps_the_short_side_and_looks_the_same() -> None:
    picture = noise(40, 30).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encoded(picture, "JPEG", quality=90)
    full = open_image(data)
    for min_side, expected in ((224, 300), (300, 300), (301, 600), (1200, 1200), (2000, 1200), (50, 150)):
        fast = open_image(data, fast=True, min_side=min_side)
        assert min(fast.size) == expected
        difference = np.asarray(fast, np.float64) - np.asarray(full.resize(fast.size, Image.Resampling.BOX), np.float64)
        assert np.abs(difference).mean() < 2.5
    assert open_image(encoded(picture, "PNG"), fast=True).size == (1600, 1200)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_a_huge_png_is_shrunk_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise(30, 20).resize((301, 203), Image.Resampling.BICUBIC).convert("L" if mode in ("L", "LA") else "RGB")
    if mode in ("RGBA", "LA"):
        picture.putalpha(noise(30, 20, seed=1).resize(picture.size).convert("L"))
    if mode == "P":
        picture = picture.quantize(64)
    data = encoded(picture, "PNG", **({"transparency": 3} if mode == "P" else {}))
    monkeypatch.setattr(images, "_STRIP", 20_000)  # bytes, so that there are several strips
    opened, alpha = open_with_alpha(data, fast=True, max_pixels=10_000)
    whole = picture
    if mode == "P":
        whole = Image.open(io.BytesIO(data)).convert("RGBA")
    assert opened.size == (101, 68)  # a third: 203 * 301 pixels exceed the limit 6.1 times
    assert np.array_equal(np.asarray(opened), np.asarray(to_rgb(whole.reduce(3))))
    assert (alpha is not None) == (mode in ("RGBA", "LA", "P"))
    with pytest.raises(ImageError, match="truncated"):
        open_image(data[: len(data) // 2], fast=True, max_pixels=10_000)


# refused


def test_zero_bytes_folder_missing_and_strange_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    error = refused(tmp_path / "empty.jpg")
    assert (error.path, error.reason) == (str(tmp_path / "empty.jpg"), "empty (0 bytes)")
    refused(tmp_path / "folder.jpg", "folder.jpg", "a folder")
    refused(tmp_path / "gone.jpg", "gone.jpg", "no such file")
    refused("http://example.org/cat.jpg", "web address")
    refused("a\0b.jpg", "cannot be read")
    refused(b"", "0 bytes")
    refused(io.BytesIO(), "0 bytes")
    refused(io.StringIO("text"), "opened as text")
    refused(3.5, "float")
    refused(None, "NoneType")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    refused(tmp_path / "pipe.jpg", "not a regular file")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    noise().save(path)

    def forbidden(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # chmod would not stop root, which tests often run as
    refused(path, "secret.png", "permission denied")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"just some words, renamed\n" * 10, "plain text"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"PK\x03\x04" + b"\0" * 60, "ZIP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"\0\0\0\x20ftypheic" + b"\0" * 60, "HEIC"),
        (b"\0\0\0\x20ftypisom" + b"\0" * 60, "MP4"),
        (b"\0" * 4096, "zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (bytes(range(256)) * 8, "not an image"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    refused(path, str(path), word)


def formats() -> list[str]:
    return ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("format", formats())
@pytest.mark.parametrize("part", [0.05, 0.3, 0.7])
def test_truncated(format: str, part: float) -> None:
    data = encoded(noise(200, 150), format)
    refused(data[: max(20, int(len(data) * part))])


@pytest.mark.parametrize("format", formats())
def test_random_damage_gives_a_picture_or_our_error(format: str) -> None:
    data = encoded(noise(40, 30), format)
    draw = np.random.default_rng(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            damaged = bytearray(data)
            for at in draw.integers(0, len(data), 12):
                damaged[at] = draw.integers(0, 256)
            with contextlib.suppress(ImageError):
                assert open_image(bytes(damaged)).mode == "RGB"


def test_bombs_are_refused_before_decoding() -> None:
    bomb = png_16_bit_rgb(np.zeros((1, 1, 3)))
    bomb = bomb.replace(bomb[16:24], struct.pack(">II", 60_000, 60_000))
    header = bomb[12:29]
    bomb = bomb[:29] + struct.pack(">I", zlib.crc32(header)) + bomb[33:]
    refused(bomb, "60000 x 60000 is 3,600,000,000 pixels, above the limit")
    with pytest.raises(ImageError, match="above the limit"):
        open_image(bomb, fast=True)


def test_the_pixel_limit_can_be_set() -> None:
    data = encoded(Image.new("L", (1000, 500)), "JPEG")
    assert open_image(data, max_pixels=500_000).size == (1000, 500)
    with pytest.raises(ImageError, match=r"1000 x 500 is 500,000 pixels, above the limit of 499,999"):
        open_image(data, max_pixels=499_999)
    assert open_image(data, max_pixels=200_000, fast=True, min_side=224).size == (500, 250)  # what is decoded counts


def test_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "truncated", "a.jpg: truncated")


# finding


def test_is_image_goes_by_name() -> None:
    assert is_image("A.JPG")
    assert is_image(Path("x/y.webp"))
    assert not is_image("notes.txt")
    assert not is_image("jpg")


def test_find_images_sorted_recursive_without_hidden(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/deep/c.webp", "sub/.hidden.png", ".dir/d.png", "notes.txt", "Z.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["Z.gif", "a.JPG", "b.png", "sub/deep/c.webp"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").touch()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "b.png").touch()
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "out").symlink_to(outside)
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    problems: list[tuple[Path, str]] = []
    found = find_images(tmp_path, on_error=lambda path, reason: problems.append((path, reason)))
    assert found == [tmp_path / "out" / "b.png", tmp_path / "real" / "a.png"]
    assert [(path.name, reason) for path, reason in problems] == [("broken.png", "a broken link")]


def test_an_unreadable_folder_is_reported_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    problems: list[str] = []
    assert find_images(tmp_path, on_error=lambda path, reason: problems.append(f"{path.name}: {reason}")) == [
        tmp_path / "a.png"
    ]
    assert problems == ["locked: cannot read this folder: Permission denied"]
    with pytest.raises(PermissionError, match="locked"):
        find_images(tmp_path / "locked")


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_images(tmp_path / "gone")
    with pytest.raises(NotADirectoryError, match="is a file"):
        find_images(tmp_path / "file")
    assert find_images(tmp_path) == []
