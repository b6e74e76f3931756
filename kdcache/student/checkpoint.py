"""Checkpoints: a folder with the student and everything else that decides the next step, swapped in whole.

    NAME/ model.safetensors (as `Model.save` writes it; for hf: what from_pretrained opens)
          state.safetensors   optimizer, projections, generators, and weights that model.safetensors lacks
          state.json          plain values, the digests of the other two (XXH3-128) and, last, that of all before it

A new one is written as NAME.new and flushed to disk; then NAME -> NAME.old, NAME.new -> NAME, and NAME.old goes.
Between the two renames only NAME is missing, and NAME.new is whole: `find` completes the swap. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcache.cache import rawmap
from kdcache.cache.store import explain
from kdcache.canonical import DIGEST_KEY, digest
from kdcache.errors import CacheCorrupt, KDCacheError, UsageError
from kdcache.models import Model, load_weights

MODEL, TENSORS, VALUES, FILES = "model.safetensors", "state.safetensors", "state.json", "files"
WEIGHTS = "weights/"                                # in state.safetensors: what model.safetensors lacks


def save(folder: Path, model: Model, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *,
         standing: Callable[[], str] = str) -> None:
    """Put a checkpoint at `folder` in place of the one there; a crash at any moment leaves one that `find` finds.

    KDCacheError for a full disk and the like, with what `standing` says of the checkpoints that are there.
    """
    new, old = _siblings(folder)
    find(folder)
    shutil.rmtree(new, ignore_errors=True)
    try:
        with explain(folder, "saving a checkpoint", standing), _as_os_errors():
            new.mkdir(parents=True)
            _write(new, model, tensors, values)
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
            sync(folder.parent)
    except KDCacheError:
        shutil.rmtree(new, ignore_errors=True)      # half of one, and its space is wanted
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(new: Path, model: Model, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    model.save(new)
    state = {**{WEIGHTS + name: value for name, value in _unsaved(new, model.module).items()}, **tensors}
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, str(new / TENSORS))
    files = {path.relative_to(new).as_posix(): _digest(path) for path in sorted(new.rglob("*.safetensors"))}
    text = json.dumps({**values, FILES: files})     # a gradient norm may be infinite: Python reads that back
    sealed = json.dumps({**values, FILES: files, DIGEST_KEY: digest(text.encode())})
    (new / VALUES).write_text(sealed, encoding="utf-8")
    mode = stat.S_IMODE((new / VALUES).stat().st_mode)      # by the umask; safetensors' own are 0600
    for path in (*(p for p in new.rglob("*") if p.is_file()), new):
        if path.name in files and stat.S_IMODE(path.stat().st_mode) != mode:
            os.chmod(path, mode)
        sync(path)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """What safetensors met in the operating system, as the OSError that it was."""
    try:
        yield
    except SafetensorError as e:
        found = re.search(r"os error (\d+)", str(e))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from e


def _digest(path: Path) -> str:
    return rawmap.digest(rawmap.map_file(str(path)))


def find(folder: Path) -> Path | None:
    """The checkpoint at `folder`, its swap completed if it was interrupted; None if there is none."""
    new, old = _siblings(folder)
    if not folder.exists() and old.exists():
        os.rename(new if new.exists() else old, folder)
        sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    return folder if folder.exists() else None


def look(folder: Path) -> Path | None:
    """Where the checkpoint of `folder` is now, as `find` would have it; nothing is moved: a run may be training."""
    new, old = _siblings(folder)
    return folder if folder.exists() else None if not old.exists() else new if new.exists() else old


def read(folder: Path, *, state: bool = True) -> dict[str, Any]:
    """The values of a checkpoint; CacheCorrupt naming the file that is not what was saved. state: also the one of the
    optimizer's, the largest."""
    advice = f"delete {folder} to start over, or put another checkpoint in its place"
    try:
        values = dict(json.loads((folder / VALUES).read_text(encoding="utf-8")))
        expected, files = values.pop(DIGEST_KEY), dict(values[FILES])
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise CacheCorrupt(f"{folder / VALUES}: not the state of a checkpoint ({type(e).__name__}: {str(e)[:120]}); "
                           f"{advice}") from e
    for name, wanted in {VALUES: expected, **files}.items():
        if name == TENSORS and not state:
            continue
        path = folder / name
        if not path.is_file():
            raise CacheCorrupt(f"{path} is missing; {advice}")
        found = digest(json.dumps(values).encode()) if name == VALUES else _digest(path)
        if found != wanted:
            raise CacheCorrupt(f"{path} is not what was saved: its digest is {found}, {VALUES} says {wanted}; the file "
                               f"is damaged: {advice}")
    return values


def load(folder: Path, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put the weights of a checkpoint into `module`; the rest of its tensors, and its values."""
    values, tensors = read(folder), load_file(str(folder / TENSORS))
    missing = {name.removeprefix(WEIGHTS): tensors.pop(name) for name in list(tensors) if name.startswith(WEIGHTS)}
    if missing:
        state = {**missing, **_saved(folder, module)}
        if left := _left(module, {name for name, value in module.state_dict().items()
                                  if name in state and state[name].shape == value.shape}):
            raise UsageError(f"{folder} does not fit {type(module).__name__}: it has no {next(iter(left))} of shape "
                             f"{list(next(iter(left.values())).shape)}")
        module.load_state_dict(state, strict=False)
    else:
        load_weights(module, folder)
    return tensors, values


def generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the generators of torch (CPU, every GPU), numpy and Python: tensors and plain values."""
    tensors = {"rng/torch": torch.get_rng_state()}
    for index, state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        tensors[f"rng/cuda{index}"] = state
    legacy: Any = np.random.get_state()
    tensors["rng/numpy"] = torch.from_numpy(legacy[1].astype(np.int64))
    return tensors, {"numpy": [int(legacy[2]), int(legacy[3]), float(legacy[4])], "python": random.getstate()}


def restore_generators(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["rng/torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"rng/cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng/cuda{index}"], index)
    position, has_gauss, gauss = values["numpy"]
    np.random.set_state(("MT19937", tensors["rng/numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = values["python"]
    random.setstate((version, tuple(words), gauss_next))


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _siblings(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")


def _saved(folder: Path, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of model.safetensors that `module` has under the same name, in the same shape and dtype."""
    own = module.state_dict()
    if not (folder / MODEL).is_file():              # a large Hugging Face model is cut into several files
        return {}
    with safe_open(str(folder / MODEL), framework="pt") as file:
        return {name: value for name in file.keys() if name in own
                for value in [file.get_tensor(name)]
                if value.shape == own[name].shape and value.dtype == own[name].dtype}


def _unsaved(folder: Path, module: nn.Module) -> dict[str, Tensor]:
    """The weights of `module`, each once, that stand under no name of theirs in model.safetensors."""
    return _left(module, set(_saved(folder, module)))


def _left(module: nn.Module, names: Set[str]) -> dict[str, Tensor]:
    """The weights of `module`, each once, that are none of `names` nor tied to one."""
    own = module.state_dict()
    done = {(own[name].data_ptr(), own[name].shape) for name in names}
    out = {}
    for name, value in own.items():
        place = (value.data_ptr(), value.shape)
        if name not in names and (place not in done or not value.numel()):
            out[name] = value
            done.add(place)
    return out
