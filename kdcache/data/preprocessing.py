"""How pictures become what a model is given: resized, cut, scaled; as `imagefolder:` does it and
models ask for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.data.code_specs import no_foreign_code
from kdcache.errors import UsageError, did_you_mean
from kdcache.user.code_errors import describe, reraise_interrupt

# what a Hugging Face folder says it in
FILES = ("preprocessor_config.json", "processor_config.json")
# by Pillow's numbers
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
COVER = "cover"
Box = tuple[float, float, float, float]
# width and height of the pictures that a reading is proved on
CHECKED = ((61, 47), (90, 150))
ADVICE = (
    "give --data-arg size=, mean= and std= (then a picture is resized to cover the size, and its "
    "middle is taken), or --data-arg preprocessing=none"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What is done with a picture of RGB in 0..1.

    size: (height, width) of what a model is given. resize: "cover", the middle of the picture in
    the shape of `size`, resized to it; a number, the shortest edge becomes so long, and the middle
    of that is taken; or (height, width), to which it is stretched, and the middle of that is taken.
    Then (pixel - mean) / std, of red, green and blue.
    """

    size: tuple[int, int]
    resize: str | int | tuple[int, int] = COVER
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        whole = self.whole
        if whole is not None and (whole[0] < self.size[0] or whole[1] < self.size[1]):
            raise UsageError(
                f"preprocessing: pictures of {whole[0]} x {whole[1]} have no middle of "
                f"{self.size[0]} x {self.size[1]}"
            )

    @property
    def whole(self) -> tuple[int, int] | None:
        """The least (height, width) of a picture that is resized, before its middle is taken; None
        for "cover".
        """
        if isinstance(self.resize, str):
            return None
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def __str__(self) -> str:
        """In words, for the start block."""
        height, width = self.size
        how = {
            str: "resized to cover",
            int: f"shortest edge {self.resize}, the middle of",
            tuple: "stretched to"
            if self.resize == self.size
            else f"stretched to {self.resize}, the middle of",
        }
        numbers = "".join(
            f", {name} {' '.join(f'{value:g}' for value in values)}"
            for name, values in (("mean", self.mean), ("std", self.std))
        )
        return f"{how[type(self.resize)]} {height} x {width}, {self.interpolation}{numbers}"

    def to_text(self) -> str:
        """As an identity and run.toml keep it: canonical JSON."""
        return json.dumps(
            {
                "size": self.size,
                "resize": self.resize,
                "interpolation": self.interpolation,
                "mean": self.mean,
                "std": self.std,
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, document: Any, where: str) -> Preprocessing:
        """Of what `to_text` writes, read as JSON. UsageError for anything else."""
        if (
            not isinstance(document, Mapping)
            or not {"size"} <= document.keys() <= cls.__dataclass_fields__.keys()
        ):
            raise UsageError(
                f"{where}: expected an object with size and, if need be, "
                f"{', '.join(sorted(cls.__dataclass_fields__.keys() - {'size'}))}; found "
                f"{document!r:.80}"
            )
        resize, interpolation = (
            document.get("resize", COVER),
            document.get("interpolation", "bicubic"),
        )
        if interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"{where}: interpolation is "
                f"{interpolation!r}{did_you_mean(str(interpolation), INTERPOLATIONS)}"
            )
        if resize != COVER and type(resize) is not int:
            resize = size_of(resize, f"{where}: resize")
        return cls(
            size=size_of(document["size"], f"{where}: size"),
            resize=resize,
            interpolation=interpolation,
            mean=channels(document.get("mean", (0.0, 0.0, 0.0)), f"{where}: mean"),
            std=channels(document.get("std", (1.0, 1.0, 1.0)), f"{where}: std", above=0.0),
        )

    def apply(
        self, image: Any, box: Box | None = None, *, flip: bool = False
    ) -> npt.NDArray[np.float32]:
        """A Pillow image, RGB or F of 0..1 (see `images.picture`), as float32 [3, height, width].

        box: the part of it that is taken, resized to `size` whatever `resize` says; flip: mirrored.
        """
        method, (height, width) = INTERPOLATIONS.index(self.interpolation), self.size
        if box is None and self.resize == COVER:
            # The largest box of the wanted shape around the middle: resizing it is "resize to
            # cover, crop the middle".
            scale = min(image.width / width, image.height / height)
            left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
            box = (left, top, left + scale * width, top + scale * height)
        if box is not None:
            resized = image.resize((width, height), method, box=box)
        else:
            tall, wide = self._whole_of(image)
            top, left = (tall - height) // 2, (wide - width) // 2
            resized = image.resize((wide, tall), method).crop(
                (left, top, left + width, top + height)
            )
        pixels = np.asarray(resized, np.float32)
        # of 0..1; bicubic overshoots, which 8 bits clip by themselves
        if resized.mode == "F":
            pixels = np.repeat(pixels.clip(0, 1)[:, :, None], 3, axis=2)
        else:
            pixels = pixels / np.float32(255)
        pixels = pixels[:, ::-1] if flip else pixels
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))

    def _whole_of(self, image: Any) -> tuple[int, int]:
        """(height, width) of all of an image, resized."""
        if isinstance(self.resize, tuple):
            return self.resize
        # the other edge is cut to a whole number, as torchvision and transformers do
        edge = int(self.resize)
        if image.width <= image.height:
            return int(edge * image.height / image.width), edge
        return edge, int(edge * image.width / image.height)


def read_preprocessing(given: Any, where: str) -> Preprocessing:
    """What `--data-arg preprocessing=` names: a folder of Hugging Face, its
    preprocessor_config.json, or the text or object that `to_text` writes. UsageError for what it is
    not, or asks for that is not done here."""
    if isinstance(given, Mapping):
        return Preprocessing.from_json(given, where)
    if not isinstance(given, str):
        raise UsageError(
            f"{where} is {given!r:.80}; expected none, a folder of a model, its {FILES[0]}, or an "
            "object"
        )
    if given.lstrip().startswith("{"):
        try:
            return Preprocessing.from_json(json.loads(given), where)
        except ValueError as e:
            raise (
                e if isinstance(e, UsageError) else UsageError(f"{where} is no JSON: {e}")
            ) from e
    path = Path(given).expanduser()
    folder = path.parent if path.name in FILES else path
    if not any((folder / name).is_file() for name in FILES):
        raise UsageError(f"{where}={given}: there is no {FILES[0]}")
    return of_folder(folder)


def has_preprocessing(folder: Path) -> bool:
    """Whether a folder of Hugging Face says how pictures are to be prepared."""
    return any((folder / name).is_file() for name in FILES)


def of_folder(folder: Path) -> Preprocessing:
    """What the image processor of a Hugging Face folder does, as transformers understands it.

    It is proved: two pictures go through both, to the same numbers. UsageError where they do not,
    naming what the processor asks for: a flipped order of colours, padding, an offset, ...
    """
    where = folder / next(name for name in FILES if (folder / name).is_file())
    try:
        import transformers

        with no_foreign_code(str(where), ADVICE):
            backend = (
                {"backend": "pil"}
                if int(transformers.__version__.split(".")[0]) >= 5
                else {"use_fast": False}
            )
            auto: Any = transformers.AutoImageProcessor
            processor = auto.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, **backend
            )
    except UsageError:
        raise
    except Exception as e:
        reraise_interrupt(e)
        raise UsageError(f"{where} cannot be read: {describe(e)}; {ADVICE}") from e
    for candidate in _readings(processor):
        if _same(candidate, processor):
            return candidate
    asked = ", ".join(
        f"{name} {getattr(processor, name)}"
        for name in (
            "size",
            "crop_size",
            "do_resize",
            "do_center_crop",
            "do_pad",
            "do_flip_channel_order",
            "rescale_offset",
            "do_rescale",
        )
        if getattr(processor, name, None) not in (None, False)
    )
    raise UsageError(
        f"{where} asks for what imagefolder: does not do ({type(processor).__name__}: "
        f"{asked:.300}); {ADVICE}"
    )


def of_timm(config: Mapping[str, Any]) -> Preprocessing | None:
    """Of timm's data config: input_size, crop_pct, interpolation, mean, std; None for what is cut
    otherwise.
    """
    _, height, width = config["input_size"]
    method = config.get("interpolation")
    if (
        config.get("crop_mode", "center") != "center"
        or height != width
        or method not in INTERPOLATIONS
    ):
        return None
    return Preprocessing(
        size=(height, width),
        resize=math.floor(height / config.get("crop_pct", 1.0)),
        interpolation=method,
        mean=channels(config["mean"], "mean"),
        std=channels(config["std"], "std", above=0.0),
    )


def of_torchvision(transforms: Any) -> Preprocessing | None:
    """Of the transforms that torchvision gives its weights for classification; None for others."""
    crop, resize = getattr(transforms, "crop_size", None), getattr(transforms, "resize_size", None)
    method = str(getattr(getattr(transforms, "interpolation", None), "value", ""))
    if not crop or not resize or len(crop) != 1 or len(resize) != 1 or method not in INTERPOLATIONS:
        return None
    return Preprocessing(
        size=(crop[0], crop[0]),
        resize=resize[0],
        interpolation=method,
        mean=channels(transforms.mean, "mean"),
        std=channels(transforms.std, "std", above=0.0),
    )


def size_of(size: Any, where: str) -> tuple[int, int]:
    """(height, width) of a number or two. UsageError for anything else."""
    pair = size if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(n) is int and 1 <= n <= 16384 for n in pair):
        raise UsageError(f"{where} is {size!r}; expected a number of pixels or [height, width]")
    return pair[0], pair[1]


def channels(values: Any, where: str, above: float = -math.inf) -> tuple[float, float, float]:
    """Three numbers, for red, green and blue. UsageError for anything else, or for one that is not
    `above`.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != (3,) or not np.all(np.isfinite(array)):
        raise UsageError(f"{where} is {values!r}; expected three numbers, for red, green and blue")
    if not np.all(array > above):
        raise UsageError(f"{where} is {values}; expected numbers above {above:g}")
    return float(array[0]), float(array[1]), float(array[2])


def _readings(processor: Any) -> Iterator[Preprocessing]:
    """What the attributes of an image processor may mean: classes of transformers mean several
    things by them.
    """
    size, crop = (_edges(getattr(processor, name, None)) for name in ("size", "crop_size"))
    percent = getattr(processor, "crop_pct", None)
    resizes: list[tuple[int | tuple[int, int], tuple[int, int]]] = []
    if isinstance(size, tuple):
        resizes += [(size, size), *([(size, crop)] if isinstance(crop, tuple) else [])]
    elif isinstance(size, int):
        square = (size, size)
        resizes += [(size, crop)] if isinstance(crop, tuple) else []
        if isinstance(percent, float):  # ConvNeXT
            resizes += [(int(size / percent), square), (square, square)]
        resizes += [(int(256 / 224 * size), crop)] if isinstance(crop, tuple) else []  # LeViT
        resizes += [(size, square)]
    normal = bool(getattr(processor, "do_normalize", False))
    for resize, final in resizes:
        try:
            yield Preprocessing(
                size=final,
                resize=resize,
                interpolation=INTERPOLATIONS[int(processor.resample)],
                mean=channels(processor.image_mean if normal else (0.0, 0.0, 0.0), "mean"),
                std=channels(processor.image_std if normal else (1.0, 1.0, 1.0), "std", above=0.0),
            )
        except (UsageError, AttributeError, TypeError, ValueError, IndexError):
            continue


def _edges(size: Any) -> int | tuple[int, int] | None:
    """(height, width), or the shortest edge, of what a processor calls a size."""
    if isinstance(size, int):
        return size
    height, width, shortest = (
        size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
        for name in ("height", "width", "shortest_edge")
    )
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    return shortest if isinstance(shortest, int) else None


def _same(candidate: Preprocessing, processor: Any) -> bool:
    """Whether two pictures of noise become the same numbers by both."""
    from PIL import Image

    for width, height in CHECKED:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
        image = Image.fromarray(noise)
        try:
            theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
        except Exception as e:
            reraise_interrupt(e)
            return False
        ours = candidate.apply(image)
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, atol=1e-3):
            return False
    return True


def in_words(text: str) -> str:
    """A text of `to_text` in words."""
    return str(read_preprocessing(text, "preprocessing"))
