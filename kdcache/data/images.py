"""`imagefolder:PATH`: one folder per class, images decoded with Pillow, resized and cropped the same way every time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from kdcache.errors import DataError, UsageError
from kdcache.loading import describe, let_through

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CROP_AREA = (0.35, 1.0)         # part of the picture an augmented view keeps; milder than ImageNet training's 0.08
CROP_RATIO = (3 / 4, 4 / 3)     # width : height of that part, before it is resized
Box = tuple[float, float, float, float]


class ImageFolder:
    """Images in class folders: items (float32 [3, height, width], class index).

    Pixels are RGB in 0..1, then (pixel - mean) / std. Each is resized (bicubic) so that it covers the size, then its
    middle is taken. Samples are sorted by class name, then by path. `key(i)` is XXH3-64 of the file's bytes followed
    by the label as 8 bytes, little-endian.
    """

    pure_items = True           # no generator is drawn from: see data/views.py
    name = "imagefolder"

    def __init__(self, path: str, /, *, size: int | Sequence[int] = 224, mean: Sequence[float] = (0.0, 0.0, 0.0),
                 std: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise UsageError(f"data imagefolder:{path}: no such folder")
        self.height, self.width = _size(size)
        self.mean, self.std = _channels(mean, "mean"), _channels(std, "std")
        if not np.all(self.std > 0):
            raise UsageError(f"--data-arg std is {std}; expected numbers above 0")
        self.class_names = sorted(entry.name for entry in self.root.iterdir()
                                  if entry.is_dir() and not entry.name.startswith("."))
        self.files = [(file, label) for label, folder in enumerate(self.class_names)
                      for file in sorted((self.root / folder).rglob("*"), key=Path.as_posix)
                      if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not self.files:
            raise DataError(f"{path} has no images; expected folders named after the classes with "
                            f"{', '.join(SUFFIXES)} files in them (found folders: {self.class_names[:5]})")
        self.revision = self._revision()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image, label = self._open(i)
        # The largest box of the wanted shape around the middle: resizing it is "resize to cover, crop the middle".
        scale = min(image.width / self.width, image.height / self.height)
        width, height = scale * self.width, scale * self.height
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return self._tensor(image, (left, top, left + width, top + height)), label

    def key(self, i: int) -> int:
        """XXH3-64 of the file's bytes and the label: it changes with neither Pillow's version nor the view."""
        file, label = self.files[i]
        return xxhash.xxh3_64_intdigest(file.read_bytes() + label.to_bytes(8, "little"))

    def _open(self, i: int) -> tuple[Any, int]:
        from PIL import Image
        file, label = self.files[i]
        try:
            with Image.open(file) as image:
                return image.convert("RGB"), label
        except Exception as e:          # Pillow raises OSError, SyntaxError, struct.error, ... for damaged files
            let_through(e)
            raise DataError(f"{file} cannot be decoded: {describe(e)}") from e

    def _tensor(self, image: Any, box: Box, flip: bool = False) -> torch.Tensor:
        from PIL import Image
        resized = image.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(resized, np.float32)
        pixels = (pixels[:, ::-1] if flip else pixels) / np.float32(255)
        return torch.from_numpy(np.ascontiguousarray(((pixels - self.mean) / self.std).transpose(2, 0, 1)))

    def _revision(self) -> str:
        """A hash of the files' relative paths and sizes: reading all bytes of a large folder would take hours."""
        hasher = hashlib.sha256()
        for file, _ in self.files:
            hasher.update(f"{file.relative_to(self.root).as_posix()}\0{file.stat().st_size}\n".encode())
        return f"sha256-listing:{hasher.hexdigest()[:32]}"


class AugmentedImageFolder(ImageFolder):
    """The same with views: a random part of the image, by area and shape, resized, mirrored half of the time."""

    def view(self, sample_id: int, view: int, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
        """View `view` of a sample; everything random comes from `rng`."""
        image, label = self._open(sample_id)
        area = rng.uniform(*CROP_AREA) * image.width * image.height
        ratio = np.exp(rng.uniform(*np.log(CROP_RATIO)))
        width, height = min(np.sqrt(area * ratio), image.width), min(np.sqrt(area / ratio), image.height)
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        right, bottom = min(left + width, image.width), min(top + height, image.height)     # rounding may pass the edge
        return self._tensor(image, (left, top, right, bottom), flip=bool(rng.random() < 0.5)), label


def image_folder(path: str, /, *, size: int | Sequence[int] = 224, augment: bool = False,
                 mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)) -> ImageFolder:
    """Images in class folders; size: one number or [height, width]; augment: give random views; mean, std: of RGB."""
    try:
        import PIL  # noqa: F401
    except ImportError as e:
        raise UsageError(f"data imagefolder: needs Pillow ({e}): pip install pillow") from e
    if not isinstance(augment, bool):
        raise UsageError(f"--data-arg augment is {augment!r}; expected true or false")
    made = AugmentedImageFolder if augment else ImageFolder
    return made(path, size=size, mean=mean, std=std)


def _size(size: Any) -> tuple[int, int]:
    pair = size if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(n) is int and 1 <= n <= 16384 for n in pair):
        raise UsageError(f"--data-arg size is {size!r}; expected a number of pixels or [height, width]")
    return pair[0], pair[1]


def _channels(values: Any, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        array = np.zeros(0, np.float32)
    if array.shape != (3,) or not np.all(np.isfinite(array)):
        raise UsageError(f"--data-arg {name} is {values!r}; expected three numbers, for red, green and blue")
    return array
