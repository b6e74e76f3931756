"""Sphinx: the pages of this folder and a reference made of the docstrings. `make docs` builds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kdcache

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "cache": "The files between the two stages; numpy, no torch",
    "data": "Samples, views, keys and rows; batches for both stages",
    "models": "Teachers and students",
    "loss": "The loss, its targets and its engines",
    "teacher": "Stage 1: dump-teacher",
    "student": "Stage 2: train-student",
    "kernels": "The fused kernels; torch and triton alone",
    "bench": "Races",
    "user": "What users give: arguments, paths, code",
    "process": "This process: signals, streams, ranks",
}

project = "kdcache"
copyright = "the authors of kdcache"
version = release = kdcache.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "220px"}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_type_aliases = {"Array": "Array", "Int64s": "Int64s"}
exclude_patterns = ["_build"]
# A link to a file of the repository is right on its page there, and no page here.
suppress_warnings = ["myst.xref_missing"]
PUBLIC = """
The public names
================

What ``kdcache.NAME`` gives. These names, and what the README imports, keep their meaning within a
version; everything else may move from one version to the next, and CHANGELOG.md says so.

"""


def as_rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: paragraphs, and word for word what stands in columns."""
    out: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = block.split("\n")
        if any(row.startswith(" ") or re.search(r"\S {3,}\S", row) for row in rows):
            out += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            text = re.sub(r"([\\*|_])", r"\\\1", block)
            text = re.sub(r"`([^`]+)`", lambda m: f"``{m[1].replace(chr(92), '')}``", text)
            out += [*text.split("\n"), ""]
    return out


def convert(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def write_reference(app: Any) -> None:
    """One page a room, with every module in it; api/ is made anew and kept out of the repository."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {"public": PUBLIC + "\n".join(map(_entry, kdcache.__all__))}
    for room, title in ROOMS.items():
        page = [f"{room}: {title}", "=" * (len(room) + len(title) + 2), ""]
        for path in sorted((ROOT / "kdcache" / room).glob("*.py")):
            if path.stem != "__init__":
                module = f"kdcache.{room}.{path.stem}"
                page += [module, "-" * len(module), "", f".. automodule:: {module}", ""]
        pages[room] = "\n".join(page)
    for name, text in pages.items():
        target = folder / f"{name}.rst"
        # a page that is as it was keeps its time, and is not built again
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def _entry(name: str) -> str:
    kind = "class" if isinstance(getattr(kdcache, name), type) else "function"
    return f".. auto{kind}:: kdcache.{name}\n   :no-index:\n"


def setup(app: Any) -> None:
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-process-docstring", convert)
