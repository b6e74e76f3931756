"""Class folders: which files of a tree are samples, and which names are nobody's data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.errors import DataError
from kdcache.user.arguments import is_unicode

# What systems and archivers leave behind, besides all names that begin with a dot (.DS_Store,
# .ipynb_checkpoints, and the ._name that macOS puts beside every name): Synology, QNAP, macOS'
# archiver, Windows, ext4.
NOBODYS = frozenset(
    (
        "@eaDir",
        "@Recycle",
        "#recycle",
        "#snapshot",
        "__MACOSX",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "Thumbs.db",
        "desktop.ini",
    )
)
SHOWN = 4


@dataclass(slots=True)
class ClassFolders:
    """The classes below a folder, sorted by name; (file, class) of each sample, sorted by class,
    then by path; and what else lay there, counted by the ending of its name."""

    names: list[str] = field(default_factory=list)
    files: list[tuple[Path, int]] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)

    @property
    def passed_over(self) -> str | None:
        """What was passed over, in a sentence; None if nothing was."""
        total = sum(self.passed.values())
        return (
            None
            if not total
            else (
                f"{total} other file{'s' * (total != 1)} passed over: "
                + ", ".join(
                    f"{ending or 'no ending'} {count}"
                    for ending, count in self.passed.most_common(SHOWN + 2)
                )
                + (", ..." if len(self.passed) > SHOWN + 2 else "")
            )
        )


def class_folders(root: Path, endings: Sequence[str], where: str) -> ClassFolders:
    """The files with one of `endings` (lower case) in the folders of `root`, at any depth; links
    are followed.

    DataError for a class without one, for a name that is not UTF-8, for a link to nothing, and for
    what cannot be read.
    """
    out = ClassFolders()
    folders = []
    for entry in _entries(root):
        if _is_dir(entry):
            folders.append(entry)
        else:
            out.passed[Path(entry.name).suffix.lower()] += 1
    for folder in sorted(folders, key=lambda entry: entry.name):
        found, others = [], Counter[str]()
        for file in _walk(Path(folder.path), (_place(root),)):
            if file.suffix.lower() in endings:
                if not file.is_file():
                    raise DataError(
                        f"{where}: {file} is no file, but a link to nothing or a device; remove "
                        "it, or put back what it is a link to"
                    )
                found.append(file)
            else:
                others[file.suffix.lower()] += 1
        if not found:
            held = ", ".join(
                f"{count} {ending or 'without an ending'}"
                for ending, count in others.most_common(SHOWN)
            )
            raise DataError(
                f"{where}: the class folder {folder.name!r} holds no picture "
                f"({', '.join(endings)}), but {sum(others.values())} other "
                f"files{f' ({held})' * bool(held)}; every folder is a class, and one without "
                "samples would only move the numbers of those after it: fill or remove it"
            )
        out.files += [(file, len(out.names)) for file in sorted(found, key=Path.as_posix)]
        out.names.append(folder.name)
        out.passed += others
    return out


def check_name(name: str, folder: Path | str) -> None:
    """DataError for a file name that is not UTF-8: it can stand in no message, key or header as it
    is.
    """
    if not is_unicode(name):
        raise DataError(
            f"{readable(folder)}: the name {os.fsencode(name)!r} there is not UTF-8; rename it "
            "(convmv -f latin1 -t utf8 does so for a whole tree)"
        )


def readable(path: Path | str) -> str:
    """A path as a terminal can show it: bytes that are no UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterable[Path]:
    """The files below a folder, through links, but for links to a folder that they are in."""
    place = _place(folder)
    if place in above:
        return
    for entry in _entries(folder):
        if _is_dir(entry):
            yield from _walk(Path(entry.path), (*above, place))
        else:
            yield Path(entry.path)


def _place(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What stands in a folder, but for nobody's names."""
    try:
        with os.scandir(folder) as entries:
            out = [
                entry
                for entry in entries
                if not entry.name.startswith(".") and entry.name not in NOBODYS
            ]
    except OSError as e:
        raise DataError(f"{readable(folder)} cannot be read: {e.strerror or e}") from e
    for entry in out:
        check_name(entry.name, folder)
    return out
