"""Checkpoints: a folder with the student and everything else that decides the next step, swapped in
whole.

    NAME/ model.safetensors (as `Model.save` writes it; for hf: what from_pretrained opens)
          state.safetensors   optimizer, projections, generators, and what of the student
                              model.safetensors lacks
          state.json          plain values, the digests of the other two (XXH3-128) and, last, that
                              of all before it

A new one is written as NAME.new and flushed to disk; then NAME -> NAME.old, NAME.new -> NAME, and
NAME.old goes. Between the two renames only NAME is missing, and NAME.new is whole: `find` completes
the swap. No pickle anywhere. Links are never followed where something is written or deleted.

Whoever reads a checkpoint opens all its files first. From then on it is whole for them, whatever a
run that saves meanwhile does to the names; where a swap comes between two of the openings, they
begin again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcache.cache import mapping, rawmap
from kdcache.cache.canonical import DIGEST_KEY, digest, load_object
from kdcache.cache.store import as_cache_errors, read_plain, sync_folder
from kdcache.errors import CacheCorrupt, KDCacheError, UsageError
from kdcache.models.model import Model
from kdcache.models.weights import fit_weights, materialise, storage_of
from kdcache.user.code_errors import describe, printable, reraise_interrupt

T = TypeVar("T")

MODEL, TENSORS, VALUES, FILES = "model.safetensors", "state.safetensors", "state.json", "files"
# the checkpoint that is tried before the first step
TRIAL = ".trial"
# in state.safetensors: what model.safetensors lacks
WEIGHTS, BUFFERS = "weights/", "buffers/"
# bytes of state.json; Python's generator takes 8 KiB
MAX_STATE = 2**24
# to read beside a run that saves: a second in all
TRIES, PAUSE = 200, 0.005
LOOKS = 3
# of chmod: gcsfuse, CIFS
NO_MODES = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# of a folder: s3fs, gcsfuse
NO_RENAMES = (*NO_MODES, errno.EXDEV, errno.EACCES)
OPENED = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


def save(
    folder: Path,
    model: Model,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    what_is_saved: Callable[[], str] = str,
) -> None:
    """Put a checkpoint at `folder` in place of the one there; a crash at any moment leaves one that
    `find` finds.

    KDCacheError for a full disk and the like, with what `what_is_saved` says of the checkpoints that are
    there; UsageError for a student that cannot be saved.
    """
    new, old = _siblings(folder)
    try:
        with as_cache_errors(folder, "saving a checkpoint", what_is_saved), _as_os_errors():
            if find(folder) is None:
                clear(new)
            new.mkdir()
            _write(new, model, tensors, values)
            _swap(folder, new, old)
    except KDCacheError:
        clear(new)  # half of one, and its space is wanted
        raise
    clear(old)


def _write(
    new: Path, model: Model, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    try:
        model.save(new)
        state = {
            **{WEIGHTS + name: value for name, value in _unsaved(new, model.module).items()},
            **tensors,
        }
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in state.items()},
            str(new / TENSORS),
        )
    except (KDCacheError, OSError, SafetensorError):
        raise
    # the student's own state_dict or save_pretrained may raise anything
    except Exception as e:
        reraise_interrupt(e)
        raise UsageError(
            f"the student ({type(model.module).__name__}) cannot be saved: {describe(e)}"
        ) from e
    files = {
        path.relative_to(new).as_posix(): _digest(path)
        for path in sorted(new.rglob("*.safetensors"))
    }
    # a gradient norm may be infinite: Python reads that back
    text = json.dumps({**values, FILES: files})
    sealed = json.dumps({**values, FILES: files, DIGEST_KEY: digest(text.encode())})
    (new / VALUES).write_text(sealed, encoding="utf-8")
    # by the umask; safetensors' own are 0600
    mode = stat.S_IMODE((new / VALUES).stat().st_mode)
    for path in (p for p in new.rglob("*") if p.is_file()):
        if path.relative_to(new).as_posix() in files and stat.S_IMODE(path.stat().st_mode) != mode:
            _set_mode(path, mode)
        sync(path)
    for path in (p for p in (*new.rglob("*"), new) if p.is_dir()):
        sync_folder(path)


def _set_mode(path: Path, mode: int) -> None:
    """Where a file system has no modes nothing is lost: they are for the convenience of other
    users.
    """
    try:
        os.chmod(path, mode)
    except OSError as e:
        if e.errno not in NO_MODES:
            raise


def _swap(folder: Path, new: Path, old: Path) -> None:
    try:
        if os.path.lexists(folder):
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError as e:
        if e.errno not in NO_RENAMES:
            raise
        raise KDCacheError(
            f"{folder}: its file system does not rename a folder ({e.strerror}), by which a "
            "checkpoint takes the place of the one before; give an --out on another file system"
        ) from e
    sync_folder(folder.parent)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """What safetensors met in the operating system, as the OSError that it was."""
    try:
        yield
    except SafetensorError as e:
        found = re.search(r"os error (\d+)", str(e))
        if found is None:
            raise UsageError(f"the student cannot be saved: {describe(e)}") from e
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from e


def _digest(path: Path | str) -> str:
    return rawmap.digest(mapping.map_file(str(path)))


def clear(path: Path) -> None:
    """Delete what has this name: a folder and all in it, a file, or a link but not what it leads
    to.
    """
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    # it is gone, or may not be deleted: whoever needs its name will say so
    except OSError:
        return


def clear_trial(run: Path) -> None:
    """Delete what a trial that was killed left in the folder of a run."""
    for path in (run / TRIAL, *_siblings(run / TRIAL)):
        clear(path)


def find(folder: Path) -> Path | None:
    """The checkpoint at `folder`, its swap completed if it was interrupted; None if there is none.

    For who holds the lock of the run: what a swap or a save left unfinished is deleted.
    """
    new, old = _siblings(folder)
    if not os.path.lexists(folder) and _is_own(old):
        os.rename(new if _is_own(new) else old, folder)
        sync_folder(folder.parent)
    clear(old)
    if not os.path.lexists(folder):
        return None
    clear(new)
    return folder


def look(folder: Path) -> Path | None:
    """Where the checkpoint of `folder` is now, as `find` would have it; nothing is moved: a run may
    be training.
    """
    new, old = _siblings(folder)
    # a swap may end between the two questions: 83 of 720,680 times, twice in a row never
    for _ in range(LOOKS):
        if os.path.lexists(folder):
            return folder
        if _is_own(old):
            return new if _is_own(new) else old
    return None


def _is_own(folder: Path) -> bool:
    """Whether it is a folder, and no link to one, with the state of a checkpoint."""
    return not folder.is_symlink() and os.path.lexists(folder / VALUES)


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint whose files are open. paths: names of its files -> paths that lead to them while
    they are open.
    """

    folder: Path
    paths: Mapping[str, str]
    values: dict[str, Any]


def beside_saves(folder: Path, use: Callable[[Path], T], *, once: bool = False) -> T:
    """What `use` gives for the place of the checkpoint of `folder`; asked again if a run swapped it
    meanwhile.

    Its errors pass once the folder has stayed the same. once: what it gives stays true after a
    swap. CacheCorrupt if there is no checkpoint, KDCacheError if another one stands there each
    time.
    """
    for _ in range(TRIES):
        found = look(folder)
        before = _identity(found)
        try:
            if found is None:
                raise CacheCorrupt(f"{folder}: there is no such checkpoint")
            made = use(found)
        except Exception as e:
            reraise_interrupt(e)
            if before == _identity(look(folder)):
                raise
        else:
            if once or before == _identity(look(folder)):
                return made
        time.sleep(PAUSE)
    raise KDCacheError(
        f"{folder} was saved again each of the {TRIES} times that it was read; ask again when the "
        "run saves less often, or is finished"
    )


@contextmanager
def opened(folder: Path, *, state: bool = True) -> Iterator[Opened]:
    """The checkpoint of `folder`, proved whole; CacheCorrupt naming the file that is not what was
    saved.

    state: also state.safetensors, with the optimizer's state the largest file.
    """
    with ExitStack() as held:
        one = _held(folder, held, lambda name: state or name != TENSORS)
        _prove(folder, one)
        yield one


def read(folder: Path, *, state: bool = True) -> dict[str, Any]:
    """The values of a checkpoint that is proved whole, as `opened` does."""
    with opened(folder, state=state) as one:
        return one.values


def values_of(folder: Path) -> dict[str, Any] | None:
    """The values of a checkpoint, None if there is none; its weights are not looked at."""
    if look(folder) is None:
        return None
    with ExitStack() as held:
        return _held(folder, held, lambda name: False).values


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint; None if there is none, or none that can be read."""
    try:
        step = (values_of(folder) or {}).get("step")
    except (KDCacheError, OSError) as e:
        reraise_interrupt(e)
        return None
    return step if type(step) is int else None


def load(folder: Path, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put the weights of a checkpoint into `module`; the rest of its tensors, and its values.

    CacheCorrupt for a checkpoint that is damaged, UsageError for one of another module.
    """
    with opened(folder) as one:
        tensors = _load_file(folder, one, TENSORS)
        missing, buffers = (_taken(prefix, tensors) for prefix in (WEIGHTS, BUFFERS))
        saved = _load_file(folder, one, MODEL) if MODEL in one.paths else {}
    if missing:
        materialise(module, {**saved, **missing})
        state = {**missing, **_same(saved, module)}
        if left := _left(
            module,
            {
                name
                for name, value in module.state_dict().items()
                if name in state and state[name].shape == value.shape
            },
        ):
            raise UsageError(
                f"{folder} does not fit {type(module).__name__}: it has no {next(iter(left))} of "
                f"shape {list(next(iter(left.values())).shape)}"
            )
        module.load_state_dict(state, strict=False)
    else:
        fit_weights(module, saved, folder / MODEL)
    own = dict(module.named_buffers())
    with torch.no_grad():
        for name, value in buffers.items():
            if name not in own or own[name].shape != value.shape:
                raise UsageError(
                    f"{folder} does not fit {type(module).__name__}: it has no buffer {name} of "
                    f"shape {list(value.shape)}"
                )
            own[name].copy_(value)
    return tensors, one.values


def check_same(folder: Path, module: nn.Module) -> None:
    """UsageError naming the first tensor of `module` that the checkpoint at `folder` does not give
    back bit for bit.
    """
    own, right = module.state_dict(), set[str]()
    with opened(folder) as one:
        for file, prefix in ((MODEL, ""), (TENSORS, WEIGHTS)):
            # one tensor at a time: a second copy of a large student may not fit
            if file in one.paths:
                with safe_open(one.paths[file], framework="pt") as tensors:
                    for name in tensors.keys():
                        value = (
                            own.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
                        )
                        if value is not None and _equal(tensors.get_tensor(name), value):
                            right.add(name.removeprefix(prefix))
    places = {storage_of(own[name]) for name in right}
    for name, value in own.items():
        # nor tied to one that is there
        if name not in right and (storage_of(value) not in places or not value.numel()):
            raise UsageError(
                f"the student ({type(module).__name__}) cannot be saved: its {name} "
                f"({value.dtype}, {list(value.shape)}) does not come back from its own checkpoint"
            )


def sync(path: Path) -> None:
    """Flush a file to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _siblings(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")


def _identity(folder: Path | None) -> tuple[int, ...] | None:
    """What tells a folder from the one that had its name before: a rename changes its times, too."""
    try:
        found = None if folder is None else os.stat(folder)
    except OSError:
        return None
    return (
        None
        if found is None
        else (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    )


def _held(folder: Path, held: ExitStack, wanted: Callable[[str], bool]) -> Opened:
    """The checkpoint of `folder` with the files that are `wanted` open, in `held`."""

    def use(found: Path) -> tuple[Opened, ExitStack]:
        with ExitStack() as mine:
            return _open(folder, found, mine, wanted), mine.pop_all()

    with as_cache_errors(folder, "reading a checkpoint"):
        one, files = beside_saves(folder, use, once=True)
    held.push(files)
    return one


def _open(folder: Path, found: Path, held: ExitStack, wanted: Callable[[str], bool]) -> Opened:
    """Open the checkpoint that is `found` in place of `folder`, which errors name. Nothing outside
    it is opened.
    """
    top = os.open(found, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    held.callback(os.close, top)
    try:
        data = read_plain(VALUES, MAX_STATE, dir_fd=top)
    except CacheCorrupt as e:
        raise CacheCorrupt(f"{folder}/{e}; {_advice(folder)}") from None
    except OSError as e:
        raise _unreadable(folder / VALUES, e) from e
    if data is None:
        raise _unreadable(folder / VALUES, FileNotFoundError())
    values = load_object(data, str(folder / VALUES), _advice(folder))
    expected, files = values.pop(DIGEST_KEY, None), values.get(FILES)
    if digest(json.dumps(values).encode()) != expected:
        raise CacheCorrupt(
            f"{folder / VALUES} is not what was saved: the digest at its end is of other values; "
            f"{_advice(folder)}"
        )
    if not (
        isinstance(files, dict)
        and TENSORS in files
        and all(map(_is_inside, files))
        and all(type(value) is str for value in files.values())
    ):
        raise CacheCorrupt(
            f"{folder / VALUES}: its {FILES!r} are no files of this folder with their digests, "
            f"among them {TENSORS}; {_advice(folder)}"
        )
    paths = {}
    for name in filter(wanted, files):
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=top)
        except OSError as e:
            raise _unreadable(folder / name, e) from e
        held.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CacheCorrupt(f"{folder / name}: not a plain file; {_advice(folder)}")
        paths[name] = f"{OPENED}/{fd}"
    return Opened(found, paths, values)


def _unreadable(path: Path, error: OSError) -> CacheCorrupt:
    why = (
        "is missing"
        if isinstance(error, FileNotFoundError)
        else f"cannot be opened ({error.strerror})"
    )
    return CacheCorrupt(f"{path} {why}; {_advice(path.parent)}")


def _prove(folder: Path, one: Opened) -> None:
    for name, path in one.paths.items():
        if _digest(path) != one.values[FILES][name]:
            raise CacheCorrupt(
                f"{folder / name} is not what was saved, {VALUES} has another digest for it; the "
                f"file is damaged: {_advice(folder)}"
            )


def _advice(folder: Path) -> str:
    return f"put a copy of it in its place, or move {folder} away to go on without this checkpoint"


def _is_inside(name: str) -> bool:
    """Whether a name of a file can only be one in its folder."""
    parts = PurePosixPath(name).parts
    return (
        name.endswith(".safetensors")
        and name == printable(name)
        and len(name) < 256
        and bool(parts)
        and not ({"..", "/", "//"} & {*parts})
    )


def _load_file(folder: Path, one: Opened, name: str) -> dict[str, Tensor]:
    try:
        return dict(load_file(one.paths[name]))
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise CacheCorrupt(
            f"{folder / name} holds no tensors ({describe(e)}); {_advice(folder)}"
        ) from e


def _taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, taken out of `tensors`, without the prefix."""
    return {
        name.removeprefix(prefix): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(prefix)
    }


def _same(saved: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors that `module` has under the same name, in the same shape and dtype."""
    own = module.state_dict()
    return {
        name: value
        for name, value in saved.items()
        if name in own and value.shape == own[name].shape and value.dtype == own[name].dtype
    }


def _unsaved(folder: Path, module: nn.Module) -> dict[str, Tensor]:
    """The weights of `module`, each once, that stand under no name of theirs in model.safetensors."""
    own, names = module.state_dict(), set[str]()
    # a large Hugging Face model is cut into several files
    if (folder / MODEL).is_file():
        with safe_open(str(folder / MODEL), framework="pt") as file:
            for name in file.keys():
                if (
                    name in own
                    and file.get_tensor(name).shape == own[name].shape
                    and (file.get_tensor(name).dtype == own[name].dtype)
                ):
                    names.add(name)
    return _left(module, names)


def _left(module: nn.Module, names: Set[str]) -> dict[str, Tensor]:
    """The weights of `module`, each once, that are none of `names` nor tied to one."""
    own = module.state_dict()
    done = {storage_of(own[name]) for name in names}
    out = {}
    for name, value in own.items():
        if (
            name not in names
            and isinstance(value, Tensor)
            and (storage_of(value) not in done or not value.numel())
        ):
            out[name] = value
            done.add(storage_of(value))
    return out


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN and all."""
    x, y = (value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(x, y)
