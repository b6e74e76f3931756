"""Every Python block of README.md runs as it is written, beside caches at the paths that it names."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import VOCABULARY, Net, Points, TinyLM, Windows, write_cache

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """caches/digits, of 10 classes, and caches/lm, of tokens."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "caches").mkdir()
    write_cache(folder / "caches" / "digits", Points(70, classes=10), Net(classes=10))
    write_cache(
        folder / "caches" / "lm", Windows(24), TinyLM(), kind="topk", tiers=(5,), tokens=True
    )
    return folder


def run(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    space: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(block, str(README), "exec"), space)
    return space


@pytest.mark.parametrize("at", range(len(BLOCKS)))
def test_a_block_runs(at: int, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(BLOCKS[at], caches, monkeypatch)


def test_the_language_block_selects_the_rows_that_the_teacher_answered(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: position p predicts token p + 1 of its record, unless a document starts there."""
    (block,) = (b for b in BLOCKS if 'b["rows"]' in b)
    space = run(block, caches, monkeypatch)
    assert space["V"] == VOCABULARY and all(
        p.grad is not None for p in space["student"].parameters()
    )
    want, teacher = [], TinyLM().eval()
    for i in range(16):
        item = Windows(24)[i]
        starts = item["document_start"]
        want += [(i, p) for p in range(len(starts) - 1) if not starts[p + 1]]
    record_N, position_N = space["rows"]
    assert list(zip(record_N.tolist(), position_N.tolist(), strict=True)) == want
    with torch.no_grad():
        log_q = torch.stack(
            [teacher(Windows(24)[i]["input_ids"][None])[0, p] for i, p in want]
        ).log_softmax(-1)
    found = space["targets"]
    assert len(found) == len(want)
    # float32 values; batches of another shape round the teacher's products otherwise.
    torch.testing.assert_close(found.log_probs_NK, log_q.gather(1, found.ids_NK), rtol=0, atol=1e-5)


def test_blocks_were_found() -> None:
    assert len(BLOCKS) == README.read_text(encoding="utf-8").count("```python") >= 3
