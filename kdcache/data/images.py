"""`imagefolder:PATH`: one folder per class, images decoded with Pillow, resized and cropped the
same way every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kdcache.data.folders import ClassFolders, class_folders
from kdcache.data.preprocessing import Preprocessing, channels, read_preprocessing, size_of
from kdcache.errors import DataError, UsageError
from kdcache.user.code_errors import describe, reraise_interrupt
from kdcache.user.paths import local_path

log = logging.getLogger("kdcache")
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 8
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# part of the picture an augmented view keeps; milder than ImageNet training's 0.08
CROP_AREA = (0.35, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)  # width : height of that part, before it is resized


class ImageFolder:
    """Images in class folders: items (float32 [3, height, width], class index).

    Every folder is a class, with all pictures below it; links are followed. Names that begin with a
    dot, and those that systems leave behind (data/folders.py), are nobody's.

    What a picture is, by its mode, as values in 0..1 for red, green and blue:
    - RGB and L (grey) 8 bits / 255 (of 16 bits in colour Pillow keeps the upper 8), 1 bit 0 or 1, P
      its palette's colours; grey is the same in all three
    - I;16 (PNG, TIFF) and I (PGM, TIFF; 32 bits that hold 16) / 65535, or the largest value of the
      bits that a TIFF says; outside that it is refused by name. F (TIFF) as it is; outside 0..1 it
      is refused
    - alpha (RGBA, LA, PA, a transparent colour): as it looks on white
    - CMYK and other colour spaces: as Pillow converts them to RGB, by formula, without colour
      profiles
    - turned and mirrored as its EXIF orientation says, where that can be read; of several frames or
      pages the first

    Then it is resized and cut, and (pixel - mean) / std is taken, as its `Preprocessing` says.
    Samples are sorted by class name, then by path. `key(i)` is XXH3-64 of the file's bytes followed
    by the label as 8 bytes, little-endian.
    """

    pure_items = True  # no generator is drawn from: see data/views.py
    name = "imagefolder"

    def __init__(self, path: str, /, preprocessing: Preprocessing) -> None:
        self.root = local_path(path, "data imagefolder")
        if not self.root.is_dir():
            raise UsageError(f"data imagefolder:{path}: no such folder")
        self.prepare, self.preprocessing = preprocessing, preprocessing.to_text()
        found = class_folders(self.root, SUFFIXES, f"data imagefolder:{path}")
        self.class_names, self.files = found.names, found.files
        if not self.files:
            raise DataError(
                f"{path} has no images; expected folders named after the classes with "
                f"{', '.join(SUFFIXES)} files in them; found no folder{_beside(found)}"
            )
        if found.passed_over is not None:
            log.warning("data imagefolder:%s: %s", path, found.passed_over)
        self.revision = self._revision()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image, label = self._open(i)
        return torch.from_numpy(self.prepare.apply(image)), label

    def key(self, i: int) -> int:
        """XXH3-64 of the file's bytes and the label: it changes with neither Pillow's version nor
        the view.
        """
        file, label = self.files[i]
        return xxhash.xxh3_64_intdigest(file.read_bytes() + label.to_bytes(8, "little"))

    def _open(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        file, label = self.files[i]
        try:
            with Image.open(file) as image:
                image.load()
                return picture(image), label
        except DataError as e:
            raise DataError(f"{file}: {e}") from e
        # Pillow raises OSError, SyntaxError, struct.error, ... for damaged files
        except Exception as e:
            reraise_interrupt(e)
            raise DataError(f"{file} cannot be decoded: {describe(e)}") from e

    def _revision(self) -> str:
        """A hash of the files' relative paths and sizes: reading all bytes of a large folder would
        take hours.
        """
        hasher = hashlib.sha256()
        for file, _ in self.files:
            hasher.update(
                f"{file.relative_to(self.root).as_posix()}\0{file.stat().st_size}\n".encode()
            )
        return f"sha256-listing:{hasher.hexdigest()[:32]}"


class AugmentedImageFolder(ImageFolder):
    """The same with views: a random part of the image, by area and shape, resized, mirrored half of
    the time.
    """

    def view(self, sample_id: int, view: int, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
        """View `view` of a sample; everything random comes from `rng`."""
        image, label = self._open(sample_id)
        area = rng.uniform(*CROP_AREA) * image.width * image.height
        ratio = np.exp(rng.uniform(*np.log(CROP_RATIO)))
        width, height = (
            min(np.sqrt(area * ratio), image.width),
            min(np.sqrt(area / ratio), image.height),
        )
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        # rounding may pass the edge
        right, bottom = min(left + width, image.width), min(top + height, image.height)
        box = (float(left), float(top), float(right), float(bottom))
        return torch.from_numpy(
            self.prepare.apply(image, box, flip=bool(rng.random() < 0.5))
        ), label


def picture(image: Any) -> Any:
    """A Pillow image as the two modes that are worked with: RGB of 8 bits, or F of 0..1 for grey of
    more than 8.

    See `ImageFolder` for what each mode is. DataError for values beyond what its mode is scaled by.
    """
    from PIL import Image, ImageOps

    # an EXIF block that is no EXIF says nothing about the picture
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_deep_grey(image))
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        # nothing shines through: most pictures with alpha
        if shown.getextrema()[3][0] == 255:
            return shown.convert("RGB")
        white = Image.new("RGBA", shown.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, shown).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Any) -> npt.NDArray[np.float32]:
    """Grey of more than 8 bits as float32 [height, width] in 0..1."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    largest = 1.0 if image.mode == "F" else float(2 ** min(bits, 16) - 1)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= largest:  # also NaN
        raise DataError(
            f"it is of mode {image.mode} with values from {low:g} to {high:g}; expected 0 to "
            f"{largest:g}: convert it to 8 or 16 bits"
        )
    grey = values.astype(np.float32) / np.float32(largest)
    hidden = image.info.get("transparency")  # of a PNG: the value that is no colour
    if isinstance(hidden, int):
        grey[values == hidden] = 1
    return 1 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


def _beside(found: ClassFolders) -> str:
    return "" if found.passed_over is None else f", and {found.passed_over}"


def image_folder(
    path: str,
    /,
    *,
    size: int | Sequence[int] | None = None,
    augment: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preprocessing: Any = None,
) -> ImageFolder:
    """Images in class folders; augment: give random views.

    size: one number, 224, or [height, width]; mean, std: of RGB, 0 and 1. preprocessing, in their
    place: "none", or as a model does it: its folder, the preprocessor_config.json there, or an
    object of `Preprocessing`. The commands give that of the teacher, cache or run where none of the
    four is given.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as e:
        raise UsageError(f"data imagefolder: needs Pillow ({e}): pip install pillow") from e
    if not isinstance(augment, bool):
        raise UsageError(f"--data-arg augment is {augment!r}; expected true or false")
    given = [
        name for name, value in (("size", size), ("mean", mean), ("std", std)) if value is not None
    ]
    if preprocessing not in (None, "none"):
        if given:
            raise UsageError(
                f"--data-arg {given[0]} and preprocessing both say how pictures are prepared; give "
                "one"
            )
        asked = read_preprocessing(preprocessing, "--data-arg preprocessing")
    else:
        asked = Preprocessing(
            size=size_of(224 if size is None else size, "--data-arg size"),
            mean=channels((0, 0, 0) if mean is None else mean, "--data-arg mean"),
            std=channels((1, 1, 1) if std is None else std, "--data-arg std", above=0.0),
        )
    return (AugmentedImageFolder if augment else ImageFolder)(path, asked)
