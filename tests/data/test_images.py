"""imagefolder: what a picture is, mode by mode, against the numbers that were saved; and which
files are pictures.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from kdcache.data.sources import load_data
from kdcache.errors import DataError

Image = pytest.importorskip("PIL.Image")
GREY = np.random.default_rng(0).integers(0, 256, (6, 8)).astype(np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (6, 8, 3)).astype(np.uint8)
ALPHA = np.random.default_rng(2).integers(0, 256, (6, 8)).astype(np.uint8)
DEEP = np.random.default_rng(3).integers(0, 65536, (6, 8)).astype(np.uint16)
ON_WHITE = (RGB * (ALPHA[..., None] / 255) + 255 * (1 - ALPHA[..., None] / 255)) / 255
PGM = b"P5\n8 6\n65535\n" + DEEP.astype(">u2").tobytes()


def png(values: np.ndarray, colours: int, hidden: int | None = None) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads and does not write in colour (PNG
    specification, 5 and 11).
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = values.astype(">u2").reshape(len(values), -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + (b"" if hidden is None else chunk(b"tRNS", struct.pack(">H", hidden)))
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def palette(transparency: int | None = None):
    image = Image.new("P", (8, 6))
    image.putdata((GREY // 86).ravel().tolist())
    image.putpalette([10, 20, 30, 40, 50, 60, 200, 210, 220])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


COLOURS = np.array([[10, 20, 30], [40, 50, 60], [200, 210, 220]])[GREY // 86] / 255
exif = Image.Exif()
exif[0x0112] = 6  # shown turned by a quarter to the right
# Ending, what is saved, how, and the values 0..1 that the picture shows: [6, 8] or [6, 8, 3].
PICTURES = {
    "rgb": ("png", Image.fromarray(RGB), {}, RGB / 255),
    "grey": ("png", Image.fromarray(GREY), {}, GREY / 255),
    "grey 16 png": ("png", Image.fromarray(DEEP), {}, DEEP / 65535),
    "grey 16 png with a hole": (
        "png",
        png(DEEP, 0, DEEP[0, 0]),
        {},
        np.where(DEEP == DEEP[0, 0], 1, DEEP / 65535),
    ),
    "rgb of two bytes": ("png", png(RGB.astype(np.uint16) * 257, 2), {}, RGB / 255),
    "rgb and alpha of two bytes": (
        "png",
        png(np.dstack([RGB, ALPHA]).astype(np.uint16) * 257, 6),
        {},
        ON_WHITE,
    ),
    "grey 16 tiff": ("tif", Image.fromarray(DEEP), {}, DEEP / 65535),
    "grey 16 tiff, other end": ("tif", Image.fromarray(DEEP.astype(">u2")), {}, DEEP / 65535),
    "grey 16, white is 0": ("tif", Image.fromarray(DEEP), {"tiffinfo": {262: 0}}, 1 - DEEP / 65535),
    "grey 16 pgm": ("pgm", PGM, {}, DEEP / 65535),
    "grey 32 tiff": ("tif", Image.fromarray(DEEP.astype(np.int32)), {}, DEEP / 65535),
    "float tiff": ("tiff", Image.fromarray((DEEP / 65535).astype(np.float32)), {}, DEEP / 65535),
    "1 bit": ("png", Image.fromarray(GREY > 99), {}, GREY > 99),
    "palette": ("png", palette(), {}, COLOURS),
    "palette gif": ("gif", palette(), {}, COLOURS),
    "palette with a hole": (
        "png",
        palette(1),
        {"transparency": 1},
        np.where(GREY[..., None] // 86 == 1, 1, COLOURS),
    ),
    "alpha": ("png", Image.fromarray(np.dstack([RGB, ALPHA])), {}, ON_WHITE),
    "opaque alpha": (
        "png",
        Image.fromarray(np.dstack([RGB, np.full_like(GREY, 255)])),
        {},
        RGB / 255,
    ),
    "grey alpha": (
        "png",
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]),
        {},
        (GREY * (ALPHA / 255) + 255 - ALPHA) / 255,
    ),
    "a colour that is none": (
        "png",
        Image.fromarray(GREY),
        {"transparency": int(GREY[0, 0])},
        np.where(GREY == GREY[0, 0], 1, GREY / 255),
    ),
    "cmyk": (
        "tif",
        Image.merge("CMYK", [Image.fromarray(c) for c in (*np.moveaxis(RGB, 2, 0), GREY)]),
        {},
        (255 - RGB.astype(int)) * (255 - GREY[..., None].astype(int)) / 255 / 255,
    ),
    "turned": ("png", Image.fromarray(np.rot90(RGB).copy()), {"exif": exif}, RGB / 255),
    "turned tiff": ("tif", Image.fromarray(np.rot90(RGB).copy()), {"exif": exif}, RGB / 255),
    "frames": (
        "tif",
        Image.fromarray(RGB),
        {"save_all": True, "append_images": [Image.fromarray(GREY)]},
        RGB / 255,
    ),
}


def save(path: Path, name: str) -> None:
    ending, image, options, _ = PICTURES[name]
    path.mkdir(parents=True, exist_ok=True)
    file = path / f"p.{ending}"
    if isinstance(image, bytes):
        file.write_bytes(image)
    else:
        image.save(file, **options)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_was_saved(tmp_path: Path, name: str) -> None:
    save(tmp_path / "class", name)
    values = PICTURES[name][-1]
    wanted = np.broadcast_to(values[..., None] if values.ndim == 2 else values, (6, 8, 3))
    x, _ = load_data(f"imagefolder:{tmp_path}", {"size": [6, 8]})[0]
    # 8 bits and a blend are rounded once each; more than 8 bits keep what float32 has.
    deep = any(word in name for word in ("grey 16", "32", "float"))
    tolerance = 2e-7 if deep else (1.01 if name == "cmyk" else 0.51) / 255
    np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), wanted, atol=tolerance, rtol=0)
    half = load_data(f"imagefolder:{tmp_path}", {"size": [3, 4], "augment": True})
    assert half.view(0, 1, np.random.default_rng(0))[0].shape == (3, 3, 4)
    # where bicubic overshoots
    assert 0 <= half[0][0].min() and half[0][0].max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        DEEP.astype(np.int32) * 2,
        DEEP.astype(np.int32) - 40000,
        GREY.astype(np.float32),
        np.full((6, 8), np.nan, np.float32),
        np.full((6, 8), -0.5, np.float32),
    ],
)
def test_values_beyond_the_scale_are_refused_by_name(tmp_path: Path, values: np.ndarray) -> None:
    (tmp_path / "class").mkdir()
    Image.fromarray(values).save(tmp_path / "class" / "p.tif")
    with pytest.raises(
        DataError,
        match=r"p\.tif: it is of mode [IF] with values from .* convert it to 8 or 16 bits",
    ):
        load_data(f"imagefolder:{tmp_path}")[0]


def test_a_broken_exif_block_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.fromarray(RGB).save(tmp_path / "class" / "p.png", exif=b"Exif\0\0MM no such thing")
    x, _ = load_data(f"imagefolder:{tmp_path}", {"size": [6, 8]})[0]
    np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), RGB / 255, atol=1e-6)


def test_which_files_are_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links are followed once, nobody's names are passed over at every depth, other files are
    counted aloud.
    """
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (
        "cat/deep",
        "dog",
        ".cache",
        "__MACOSX/dog",
        "@eaDir",
        "cat/.ipynb_checkpoints",
        "dog/@eaDir",
    ):
        save(root / folder, "rgb")
    save(other / "inner", "grey")
    (root / "cat" / "._p.png").write_bytes(b"macOS")
    (root / "cat" / "linked").symlink_to(other, target_is_directory=True)
    (root / "cat" / "deep" / "up").symlink_to(root / "cat", target_is_directory=True)  # loops
    (root / "dog" / "root").symlink_to(root, target_is_directory=True)
    (root / "dog" / "self").symlink_to("self")
    (root / "eel").symlink_to(other, target_is_directory=True)
    for name in ("cat/a.txt", "cat/deep/b.txt", "dog/c.json", "README"):
        (root / name).write_text("no picture")
    caplog.set_level(logging.WARNING, logger="kdcache")
    data = load_data(f"imagefolder:{root}")
    assert data.class_names == ["cat", "dog", "eel"]
    assert [(file.relative_to(root).as_posix(), label) for file, label in data.files] == [
        ("cat/deep/p.png", 0),
        ("cat/linked/inner/p.png", 0),
        ("dog/p.png", 1),
        ("eel/inner/p.png", 2),
    ]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"data imagefolder:{root}: 5 other files passed over: no ending 2, .txt 2, .json 1"
    ]


def test_folders_that_are_no_classes_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "cat", "rgb")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"the class folder 'empty' holds no picture .*, but 0 other files; every"
    ):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "empty" / "deep" / "a.npy").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"'empty' holds no picture .*, but 1 other files \(1 \.npy\)"
    ):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "empty" / "deep" / "a.png").symlink_to("nothing")
    with pytest.raises(DataError, match=r"a\.png is no file, but a link to nothing"):
        load_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("where", ["cat/\udcff.png", "\udce9t\udce9/p.png", "cat/deep\udcff/p.png"])
def test_a_name_that_is_not_utf8_is_one_line_that_names_it(tmp_path: Path, where: str) -> None:
    file = tmp_path / where
    try:
        os.makedirs(file.parent)
        file.write_bytes(b"")
    except (OSError, UnicodeError):
        pytest.skip("this file system has names in UTF-8 only")
    with pytest.raises(
        DataError, match=r"the name b'.*\\x.*' there is not UTF-8; rename it"
    ) as caught:
        load_data(f"imagefolder:{tmp_path}")
    str(caught.value).encode()
    pytest.importorskip("tokenizers")
    from kdcache.data.text import matching_files

    with pytest.raises(DataError, match="is not UTF-8; rename it") as caught:
        matching_files(f"{tmp_path}/**/*.png")
    str(caught.value).encode()
