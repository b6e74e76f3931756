"""dump-teacher with the fused kernel: what it keeps is what torch keeps, and what it cannot do is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import refused, run
from kernel_world import allowed
from teacher_world import Broken, Points, Sentences, Speaker, files, mlp
from test_reduce import Looks, normal, oracle_order, oracle_tail, spec_of

import kdcache
from kdcache.data.transfer import wait
from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.teacher import reduce as module
from kdcache.teacher.dump import DumpReport, dump_teacher
from kdcache.teacher.reduce import Reduced, reduce_rows
from kdcache.teacher.verify import verify

EPS = torch.finfo(torch.float32).eps
TWO_LABELS = [[1, 2], [3, 3], [-1, 4], [5, -1], [-1, -1], [49, 0]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of infinities that a device knows how to
    take.
    """
    with np.errstate(all="ignore"):
        yield


def worst(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference in units of the greater of 1 and the number; infinities must be the same."""
    assert torch.equal(found.isinf(), truth.isinf()) and not bool(found.isnan().any())
    return float(
        (
            torch.where(truth.isinf(), 0, found.double() - truth).abs()
            / truth.abs().clamp(1, 1e300)
        ).max()
    )


def tails_of(logits_NV: torch.Tensor, labels_NJ: torch.Tensor | None, spec: Any) -> torch.Tensor:
    """float64 [N, tiers, T] by their definition."""
    ids, rows = oracle_order(logits_NV, spec.k), logits_NV.double().numpy()
    labels = [[]] * len(rows) if labels_NJ is None else labels_NJ.tolist()
    return torch.tensor(
        [
            [
                [
                    oracle_tail(row, {*ids[n, :k].tolist(), *labels[n]} - {-1}, float(t))
                    for t in spec.temperatures
                ]
                for k in spec.tiers
            ]
            for n, row in enumerate(rows)
        ],
        dtype=torch.float64,
    )


def same(mine: Reduced, theirs: Reduced) -> None:
    """Ids, logits and label logits are bits of the teacher, whoever picks them."""
    for name in ("top", "ids", "logits", "label_logit"):
        a, b = getattr(mine, name), getattr(theirs, name)
        assert (a is None) == (b is None) and (
            a is None or (a.dtype == b.dtype and torch.equal(a, b))
        ), name


@pytest.mark.parametrize(
    ("dtype", "labels", "changes", "padding"),
    [
        (
            torch.float32,
            None,
            {"labels": 0, "moments": False, "tiers": (8,), "temperatures": ("1",)},
            0,
        ),
        (torch.bfloat16, [[0], [-1], [49], [7], [3]], {"labels": 1}, 6),
        (
            torch.float16,
            TWO_LABELS,
            {"labels": 2, "tiers": (1, 3, 8), "temperatures": ("1", "1.37", "4")},
            3,
        ),
        (torch.bfloat16, None, {"labels": 0, "tiers": (2, 50)}, 0),
    ],
)
def test_rows_are_kept_as_torch_keeps_them(
    dtype: torch.dtype,
    labels: list[list[int]] | None,
    changes: dict[str, Any],
    padding: int,
    device: str,
) -> None:
    """Also of a padded vocabulary, whose last columns are no classes; bfloat16 has ties."""
    wide_NV = normal(5 if labels is None else len(labels), 50 + padding).to(dtype)
    # of padding that is cut it is only asked that it is not among the largest
    wide_NV[:, 50:] = torch.nan
    logits_NV, spec = wide_NV[:, :50], spec_of(50, **changes)
    labels_NJ = None if labels is None else torch.tensor(labels)
    plain = reduce_rows(wide_NV, labels_NJ, spec)
    fused = reduce_rows(wide_NV.to(device), labels_NJ, spec, engine="triton")
    same(fused, plain)
    assert fused.tail_lse is not None and plain.tail_lse is not None
    truth = tails_of(logits_NV, labels_NJ, spec)
    assert worst(fused.tail_lse, truth) <= allowed(max(worst(plain.tail_lse, truth), EPS), EPS)
    if not spec.moments:
        assert fused.mean is None and fused.std is None
        return
    rows = logits_NV.double()
    for found, expected in ((fused.mean, rows.mean(1)), (fused.std, rows.std(1, correction=0))):
        # Sums of 50 numbers in float32 by a tree: half a unit for each of 6 levels, and as much for
        # what joins them.
        assert found is not None and float((found - expected).abs().max()) <= 6 * EPS * float(
            rows.abs().max()
        )


def test_rows_are_picked_without_a_copy_of_them_and_the_others_may_hold_anything(
    device: str,
) -> None:
    logits_MV = normal(6, 4096)
    index_N, labels_NJ = torch.tensor([4, 0, 3]), torch.tensor([[9], [-1], [4095]])
    logits_MV[1, 5], logits_MV[5, 7] = float("nan"), float("inf")
    spec = spec_of(4096, moments=False)
    given = logits_MV.to(device)
    with Looks() as looks:
        picked = reduce_rows(given, labels_NJ, spec, index_N=index_N, engine="triton")
    # the one look is at the labels, on the host
    assert looks.count == 1 and looks.largest < 4096
    alone = reduce_rows(logits_MV[index_N].to(device), labels_NJ, spec, engine="triton")
    same(picked, alone)
    same(picked, reduce_rows(logits_MV, labels_NJ, spec, index_N=index_N))
    assert (
        picked.tail_lse is not None
        and alone.tail_lse is not None
        and torch.equal(picked.tail_lse, alone.tail_lse)
    )
    none = reduce_rows(given[1:2], labels_NJ[:0], spec, index_N=index_N[:0], engine="triton")
    assert (
        none.logits.shape == (0, 8)
        and none.tail_lse is not None
        and none.tail_lse.shape == (0, 2, 2)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["topk", "full"])
def test_nothing_waits_for_the_device_before_the_one_wait(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    more: dict[str, Any] = {} if kind == "topk" else {"tiers": (), "temperatures": (), "labels": 0}
    spec, waited = spec_of(50, kind=kind, **more), list[torch.device]()
    logits_MV = normal(9, 50).to(device)

    def waiting(found: torch.device) -> None:
        torch.cuda.set_sync_debug_mode("default")
        waited.append(found)
        wait(found)

    monkeypatch.setattr(module, "wait", waiting)
    try:
        torch.cuda.set_sync_debug_mode("error")
        reduce_rows(
            logits_MV,
            torch.zeros(4, 1, dtype=torch.int64) if kind == "topk" else None,
            spec,
            index_N=torch.arange(4),
            engine="triton",
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == 1


@pytest.mark.parametrize(
    ("rows", "dtype", "said"),
    [
        (
            {1: float("nan"), 2: float("inf")},
            torch.float32,
            r"row number 1: the teacher returned NaN \(2 such rows",
        ),
        (
            {2: float("inf")},
            torch.float16,
            r"row number 2: .*\+inf \(1 such rows in this batch\); float16 overflows above",
        ),
        (
            {0: float("-inf"), 2: float("nan")},
            torch.bfloat16,
            r"row number 0: .* no finite logit \(2 such rows .*at this",
        ),
    ],
)
def test_a_bad_row_is_refused_in_the_same_words(
    rows: dict[int, float], dtype: torch.dtype, said: str, device: str
) -> None:
    logits_NV = normal(3, 50).to(dtype)
    for row, value in rows.items():
        logits_NV[row, 0 if value != -float("inf") else slice(None)] = value
    texts = []
    for engine in ("torch", "triton"):
        with pytest.raises(DataError, match=said) as caught:
            reduce_rows(
                logits_NV.to(device),
                None,
                spec_of(50, labels=0),
                name_row="row number {}".format,
                engine=engine,
            )
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


# ---- dumps


def dump(out: Path, **changes: Any) -> DumpReport:
    options: dict[str, Any] = {
        "teacher": mlp(),
        "data": Points(6),
        "k": 4,
        "tiers": [2],
        "device": "cpu",
        "seed": 3,
        "values": "float32",
        "batch_size": 4,
        "records_per_shard": 3,
        "engine": "triton",
    }
    return dump_teacher(out=out, **{**options, **changes})


def columns(path: Path) -> dict[str, np.ndarray]:
    with kdcache.open(path) as cache:
        return cache.read(np.arange(cache.num_records)).columns


def check_alike(one: Path, other: Path) -> None:
    """Two caches that differ at most by what a sum in float32 rounds."""
    a, b = columns(one), columns(other)
    assert a.keys() == b.keys()
    for name in a:
        if name.split("_")[0] in ("tail", "mean", "std"):
            # Of at most 40 terms: log2(40) < 6 levels, a rounding each, on both sides.
            room = 12 * EPS * np.maximum(np.abs(a[name]), 8)
            assert (np.abs(a[name] - b[name]) <= room).all(), name
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_cache_by_the_kernel_is_that_by_torch_and_has_the_same_bytes_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, rows, fused_rows = list[str](), list[int](), module.fused_rows

    def counted(logits_MV: torch.Tensor, *rest: Any) -> Any:
        rows.append(len(logits_MV))
        return fused_rows(logits_MV, *rest)

    monkeypatch.setattr(module, "fused_rows", counted)
    report = dump(tmp_path / "c", moments=True, say=said.append)
    assert rows == [3, 3] and report.engine == "triton" and "on cpu, engine triton" in said[0]
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.recorded["engine"] == "triton" and cache.recorded["triton"]
        assert "triton" not in str(cache.spec) + str(cache.identity)
    plain = dump(tmp_path / "plain", moments=True, engine="auto")
    assert rows == [3, 3] and plain.engine == "torch"
    assert plain.covered_mass == pytest.approx(report.covered_mass, rel=1e-6)
    check_alike(tmp_path / "c", tmp_path / "plain")
    dump(tmp_path / "again", moments=True)
    assert files(tmp_path / "again") == files(tmp_path / "c")
    assert verify(tmp_path / "c", teacher=mlp(), data=Points(6), device="cpu").ok


def test_a_dump_that_was_stopped_ends_with_the_same_bytes_or_by_the_other_engine(
    tmp_path: Path,
) -> None:
    class Sudden(Exception):
        pass

    def stop(progress: Any) -> None:
        raise Sudden

    for name in ("c", "other"):
        with pytest.raises(KDCacheError, match=r"^progress: Sudden"):
            dump(tmp_path / name, batch_size=3, progress=stop)
    dump(tmp_path / "whole", batch_size=3)
    assert dump(tmp_path / "c", batch_size=3).complete
    assert files(tmp_path / "c") == files(tmp_path / "whole")
    said: list[str] = []
    assert dump(tmp_path / "other", batch_size=3, engine="torch", say=said.append).complete
    assert "begun with other compute: engine triton, now torch; allowed" in "\n".join(said)
    check_alike(tmp_path / "other", tmp_path / "whole")
    assert verify(tmp_path / "other", teacher=mlp(), data=Points(6), device="cpu").ok


def test_a_token_cache_by_the_kernel(tmp_path: Path) -> None:
    """Sequences of several lengths: padding is reduced too and left out; labels go with the rows
    they are of.
    """
    for engine in ("torch", "triton"):
        dump(
            tmp_path / engine,
            teacher=Speaker(),
            data=Sentences(4),
            k=5,
            engine=engine,
            dtype="bfloat16",
            features=["embed:raw:float32"],
        )
    check_alike(tmp_path / "torch", tmp_path / "triton")
    assert verify(tmp_path / "triton", teacher=Speaker(), data=Sentences(4), device="cpu").ok


def test_a_teacher_that_hardly_says_anything_is_verified_too(tmp_path: Path) -> None:
    """Its tails are of size log 1000, its logits of none: what a tail rounds is not measured by the
    logits.
    """
    net = mlp(1000)
    with torch.no_grad():
        net[2].weight.mul_(1e-6)
        net[2].bias.mul_(1e-6)
    dump(tmp_path / "c", teacher=net, data=Points(3), labels=False)
    report = verify(tmp_path / "c", teacher=net, data=Points(3), device="cpu")
    assert report.ok, report.problems


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_a_bad_logit_names_the_record(tmp_path: Path, engine: str) -> None:
    data = Points(6)
    with pytest.raises(
        DataError, match=r"sample 4, view 0: the teacher returned NaN \(1 such rows in this batch\)"
    ):
        dump(
            tmp_path / "c", teacher=Broken(mlp(), data.x[4], float("nan")), data=data, engine=engine
        )
    with kdcache.open(tmp_path / "c", allow_partial=True) as cache:
        assert cache.missing() == [1]


def test_a_kind_that_is_not_reduced_has_no_part_for_the_kernel(tmp_path: Path) -> None:
    for kind, more in (("full", {}), ("none", {"features": ["0"], "values": "float16"})):
        said: list[str] = []
        report = dump(tmp_path / kind, kind=kind, k=None, tiers=None, say=said.append, **more)
        assert report.complete and report.engine == "torch"
        assert f"kind {kind} leaves nothing to reduce: engine 'triton' has no part in it" in said
        dump(tmp_path / f"{kind} by torch", kind=kind, k=None, tiers=None, engine="torch", **more)
        assert files(tmp_path / kind) == files(tmp_path / f"{kind} by torch")


class Labelled(Points):
    """Points with nine labels each."""

    def __getitem__(self, i: int) -> Any:
        return self.x[i], torch.arange(9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "tritn"}, "engine 'tritn' is unknown.*'triton'"),
        (
            {"teacher": mlp(300), "data": Points(6, classes=300), "k": 257},
            "k is 257; the kernel keeps at most 256",
        ),
        ({"teacher": mlp().double()}, "the teacher's logits are torch.float64"),
        ({"data": Labelled(6)}, "the data has 9 labels a row; the kernel takes at most 8"),
        (
            {"temperatures": [0.01]},
            r"temperatures are \[0\.01\]; expected at least one, each 0\.02 or above",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        dump(tmp_path / "c", **options)
    assert "use engine 'torch'" in str(caught.value) or "unknown" in said
    assert not (tmp_path / "c").exists()
    assert dump(tmp_path / "c", **{**options, "engine": "torch"}).complete


def test_without_a_device_for_it_the_kernel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.kernels.kd_loss_rows.INTERPRETED", False)
    for kind in ("topk", "full"):
        with pytest.raises(
            UsageError, match="the kernels need a CUDA device, and this is cpu; use engine 'torch'"
        ):
            dump(tmp_path / "c", kind=kind, k=None, tiers=None)
    assert not (tmp_path / "c").exists()


LLAMA = """
import torch, transformers
def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32))
"""


def test_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "t.py").write_text(LLAMA)
    (tmp_path / "d.py").write_text(
        "from teacher_world import Sentences\ndef sentences():\n    return Sentences(4)\n"
    )
    models = [
        "--teacher",
        f"{tmp_path}/t.py:llama",
        "--data",
        f"{tmp_path}/d.py:sentences",
        "--device",
        "cpu",
    ]
    (tmp_path / "run.toml").write_text(
        '[dump-teacher]\nk = 6\ntier = [3]\nengine = "triton"\nvalues = "float32"\n'
    )
    command = ["dump-teacher", *models, "--config", tmp_path / "run.toml"]
    done = run(*command, "--out", tmp_path / "c")
    assert done.exit_code == 0, done.stderr
    assert "on cpu, engine triton" in done.stderr
    assert run(*command, "--out", tmp_path / "plain", "--engine", "torch").exit_code == 0
    check_alike(tmp_path / "c", tmp_path / "plain")
    checked = run("verify", tmp_path / "c", *models)
    assert checked.exit_code == 0, checked.stderr
    refused(
        run(*command, "--out", tmp_path / "no", "--engine", "cuda"), 2, "engine 'cuda' is unknown"
    )
