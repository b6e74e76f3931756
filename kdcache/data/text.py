"""`text:GLOB`: text files, each tokenised alone and cut into windows; no window holds two
documents.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kdcache.data.code_specs import no_foreign_code
from kdcache.data.folders import check_name
from kdcache.errors import DataError, UsageError, did_you_mean
from kdcache.user.code_errors import users_code
from kdcache.user.paths import local_path

SPLITS = ("all", "train", "eval")
# the tokenizer works on a batch in parallel; its text is all that is held at once
FILES_PER_BATCH = 256


class TextWindows:
    """Windows of tokens: items {"input_ids": int64 [l], "document_start": uint8 [l]}, 2 <= l <=
    window.

    document_start is 1 at the first token of a document. Attributes: window, token_lengths (int64,
    l of each), tokenizer_identity (fingerprint, template, packing), vocab_size, tokenizer (a
    tokenizers.Tokenizer).
    """

    pure_items = True  # no generator is drawn from: see data/views.py
    name = "text"
    class_names: tuple[str, ...] = ()

    def __init__(
        self, documents: list[npt.NDArray[np.int32]], *, window: int, tokenizer: Any, revision: str
    ) -> None:
        self.window, self.tokenizer, self.revision = window, tokenizer, revision
        self.vocab_size = int(tokenizer.get_vocab_size())
        self.tokenizer_identity = {
            "fingerprint": fingerprint(tokenizer),
            "template": "special tokens per document",
            "packing": "per-document",
        }
        self._tokens = np.concatenate([np.zeros(0, np.int32), *documents])
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        spans = [
            (start, min(start + window, end), int(start == begin))
            for begin, end in zip([0, *ends.tolist()], ends.tolist(), strict=False)
            # end - 1: a window of one token predicts nothing
            for start in range(begin, end - 1, window)
        ]
        self._spans = np.array(spans, np.int64).reshape(-1, 3)
        self.token_lengths = self._spans[:, 1] - self._spans[:, 0]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        start, end, first = self._spans[i].tolist()
        document_start = torch.zeros(end - start, dtype=torch.uint8)
        document_start[0] = first
        return {
            "input_ids": torch.from_numpy(self._tokens[start:end].astype(np.int64)),
            "document_start": document_start,
        }


def text_windows(
    pattern: str,
    /,
    *,
    tokenizer: str,
    window: int = 128,
    max_files: int | None = None,
    split: str = "all",
    eval_fraction: float = 0.1,
    errors: str = "strict",
) -> TextWindows:
    """The text files that `pattern` (`**` reaches into folders) matches, in order of their paths,
    as windows.

    tokenizer: a tokenizer.json, or a Hugging Face folder. max_files: the first so many files.
    split: all, or train or eval, which part the documents by a hash of their paths, about
    eval_fraction of them to eval. errors: what becomes of bytes that are not UTF-8: strict
    (refused), replace or ignore.
    """
    _check_options(window, max_files, split, eval_fraction, errors)
    made = load_tokenizer(tokenizer)
    root, files = matching_files(pattern)
    if max_files is not None:
        files = files[:max_files]
    if split != "all":
        files = [
            file for file in files if (_fraction(file, root) < eval_fraction) == (split == "eval")
        ]
    hasher, documents = hashlib.sha256(), []
    for texts in _texts(files, errors):
        for text in texts:
            hasher.update(hashlib.sha256(text.encode()).digest())
        with users_code(f"--data-arg tokenizer={tokenizer} cannot encode the texts"):
            documents += [np.array(encoded.ids, np.int32) for encoded in made.encode_batch(texts)]
    data = TextWindows(
        documents, window=window, tokenizer=made, revision=f"sha256:{hasher.hexdigest()[:32]}"
    )
    if not len(data):
        raise DataError(
            f"data text:{pattern}: {len(files)} files in split {split!r} gave no window of 2 tokens"
        )
    return data


def matching_files(pattern: str) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard, and the files that match, sorted by their path relative
    to it.
    """
    parts = local_path(pattern, "data text").parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = Path(*parts[:fixed])
    found = [Path(name) for name in glob.glob(str(Path(*parts)), recursive=True)]
    files = sorted(
        (file for file in found if file.is_file()),
        key=lambda file: file.relative_to(root).as_posix(),
    )
    for file in files:
        check_name(file.relative_to(root).as_posix(), root)
    if not files:
        raise UsageError(f"data text:{pattern}: no file matches")
    return root, files


def load_tokenizer(path: str) -> Any:
    """A tokenizers.Tokenizer from a tokenizer.json, a folder that holds one, or what transformers
    can load quickly.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise UsageError(f"data text: needs tokenizers ({e}): pip install 'kdcache[hf]'") from e
    file = local_path(path, "--data-arg tokenizer")
    if file.is_dir() and (file / "tokenizer.json").is_file():
        file = file / "tokenizer.json"
    # no name of a model: do not ask a server for it
    if file.suffix == ".json" and not file.exists():
        raise UsageError(f"--data-arg tokenizer={path}: no such file")
    # tokenizers raises bare Exceptions, and panics of Rust, which are none.
    with users_code(
        f"--data-arg tokenizer={path} cannot be read; expected a tokenizer.json or a folder with "
        "one",
        UsageError,
    ):
        made: Any
        if file.is_file():
            made = Tokenizer.from_file(str(file))
        else:
            from transformers import AutoTokenizer

            with no_foreign_code(f"the tokenizer {path}", "save it as a tokenizer.json"):
                found = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
            made = getattr(found, "backend_tokenizer", None)
    if made is None:
        raise UsageError(
            f"--data-arg tokenizer={path} is no fast tokenizer; save it with a tokenizer.json"
        )
    made.no_truncation()
    made.no_padding()
    return made


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer's JSON in one form (sorted keys, no spaces), without truncation and
    padding.
    """
    with users_code("the tokenizer cannot be written as JSON"):
        document = json.loads(tokenizer.to_str())
    for setting in ("truncation", "padding"):
        document.pop(setting, None)
    return hashlib.sha256(
        json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _texts(files: list[Path], errors: str) -> Iterator[list[str]]:
    """The files' texts, some at a time. DataError names the file that cannot be read."""
    for start in range(0, len(files), FILES_PER_BATCH):
        texts = []
        for file in files[start : start + FILES_PER_BATCH]:
            try:
                # no text: a mark
                texts.append(file.read_bytes().decode("utf-8", errors).removeprefix("\ufeff"))
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{file}: byte {e.start} is not UTF-8; --data-arg errors=replace reads it so"
                ) from e
            except OSError as e:
                raise DataError(f"{file} cannot be read: {e}") from e
        yield texts


def _fraction(file: Path, root: Path) -> float:
    """A number in 0..1 from a file's path below `root`: it depends on neither the folder's place
    nor other files.
    """
    return xxhash.xxh3_64_intdigest(file.relative_to(root).as_posix().encode()) / 2**64


def _check_options(
    window: Any, max_files: Any, split: Any, eval_fraction: Any, errors: Any
) -> None:
    if type(window) is not int or not 2 <= window <= 2**24:
        raise UsageError(
            f"--data-arg window is {window!r}; expected a number of tokens, at least 2"
        )
    if max_files is not None and (type(max_files) is not int or max_files < 1):
        raise UsageError(f"--data-arg max_files is {max_files!r}; expected a number, at least 1")
    if split not in SPLITS:
        raise UsageError(f"--data-arg split is {split!r}{did_you_mean(str(split), SPLITS)}")
    if not isinstance(eval_fraction, int | float) or not 0 < eval_fraction < 1:
        raise UsageError(
            f"--data-arg eval_fraction is {eval_fraction!r}; expected a number between 0 and 1"
        )
    if errors not in ("strict", "replace", "ignore"):
        raise UsageError(f"--data-arg errors is {errors!r}; expected strict, replace or ignore")
