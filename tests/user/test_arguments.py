"""Plain arguments of the public functions: of their annotated types, or one UsageError that names
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kdcache
from kdcache.errors import UsageError
from kdcache.inspect import inspect
from kdcache.student.evaluate import evaluate
from kdcache.teacher.verify import verify
from kdcache.user.arguments import bytes_of, check_arguments, seen

Alias = Callable[[int], None] | None


def example(
    whole: int,
    *,
    real: float | None = None,
    yes: bool = False,
    path: str | Path = "x",
    names: Sequence[str] = (),
    numbers: Sequence[float | str] | None = None,
    pair: tuple[int, int] = (0, 1),
    more: Mapping[str, Any] | None = None,
    call: Callable[[str], object] | None = None,
    alias: Alias = None,
    module: nn.Module | None = None,
    device: str | torch.device = "cpu",
    anything: Any = None,
) -> None: ...


GOOD: dict[str, list[Any]] = {
    "whole": [0, -5, 2**80, np.int64(3)],
    "real": [None, 1, 0.5, np.float32(2), float("nan")],
    "yes": [True, False, np.bool_(True)],
    "path": ["a", Path("a")],
    "names": ["a", ["a", "b"], (), {"a"}],
    "numbers": [None, [1, 2.5, "3"], (np.float64(1),)],
    "pair": [(0, 1), [0, 1]],
    "more": [None, {}, {"a": object()}],
    "call": [None, print, len],
    "alias": [None, 5, print],
    "module": [None, nn.Linear(1, 1)],
    "device": ["cpu", torch.device("cpu")],
    "anything": [object(), 5],
}
BAD: dict[str, list[Any]] = {
    "whole": [None, True, 1.0, float("nan"), "1", torch.tensor(1), np.array(1), [1]],
    "real": [True, "1", 1j, torch.tensor(1.0), [1.0]],
    "yes": [0, 1, "false", None, float("nan"), torch.tensor(True)],
    "path": [None, 5, b"a", ["a"], "a\0b", "\ud800"],
    "names": [None, 5, [5], ["a", None], np.array(["a"]), {"a": 1}],
    "numbers": [5, [None], torch.ones(2)],
    "pair": [(0,), (0, 1, 2), (0, "1"), 5, "01"],
    "more": [[], "x", 5, np.zeros(2)],
    "call": [5, "print"],
    "module": [5, "x", nn.Linear],
    "device": [None, 5, Path("cpu")],
}


def test_the_rule() -> None:
    for name, values in GOOD.items():
        for value in values:
            check_arguments(example, (), {"whole": 1, name: value})
    for name, values in BAD.items():
        for value in values:
            with pytest.raises(
                UsageError, match=f"^{name} is .*(expected|no file can hold)"
            ) as caught:
                check_arguments(example, (), {"whole": 1, name: value})
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    # what Python itself refuses is left to it
    check_arguments(example, (), {})
    assert seen(np.zeros((2, 3))) == "a numpy array [2, 3] of float64" and seen("x" * 99) == "a str"


class Data:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return torch.arange(4.0) + i, i % 3


def test_the_public_functions_keep_to_it(tmp_path: Path) -> None:
    """Junk for each plain parameter of each: a UsageError, and nothing is written."""
    net, out = nn.Linear(4, 3), tmp_path / "out"
    dumped = kdcache.dump_teacher(
        teacher=net, data=Data(), out=tmp_path / "c", device="cpu", say=lambda _: None
    )
    assert dumped.complete
    calls: dict[Callable[..., Any], dict[str, Any]] = {
        kdcache.dump_teacher: {"teacher": net, "data": Data(), "out": out, "device": "cpu"},
        kdcache.train_student: {
            "student": net,
            "data": Data(),
            "alpha": 0,
            "epochs": 1,
            "out": out,
            "device": "cpu",
        },
        evaluate: {"student": net, "data": Data(), "device": "cpu"},
        verify: {"cache": tmp_path / "c"},
        inspect: {"cache": tmp_path / "c"},
        kdcache.open: {"path": tmp_path / "c"},
        kdcache.Loader: {"data": Data(), "batch_size": 4},
    }
    junk = [
        object(),
        1j,
        b"x",
        float("nan"),
        "\ud800",
        torch.zeros(2, 2),
        np.zeros((2, 2)),
        {"a": 1},
        [None],
        ...,
    ]
    tried = 0
    for function, good in calls.items():
        made = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
        for name, kind in made.__annotations__.items():
            if name in ("return", "self") or {"Any", "Sequence[Any]"} & {*kind.split(" | ")}:
                continue
            for value in junk:
                # NaN is a number: refused, or not, by who uses it
                if "float" in kind and isinstance(value, float):
                    continue
                if "Mapping" in kind and isinstance(value, dict):
                    continue
                tried += 1
                with pytest.raises(kdcache.KDCacheError):
                    function(**{**good, name: value})
                assert not out.exists(), (function, name, value)
    assert tried > 500


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    report = kdcache.train_student(
        student=nn.Linear(4, 3),
        data=Data(),
        alpha=np.float64(0),
        max_steps=np.int64(2),
        batch_size=np.int64(3),
        seed=np.int32(1),
        lr=np.float32(0.1),
        device="cpu",
        out=tmp_path / "run",
        say=lambda _: None,
    )
    assert report.finished and report.steps == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"epochs": 1e308}, r"epochs is 1e\+308"),
        ({"epochs": 0}, "epochs is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": 0.5}, r"seed is 0.5 \(float\)"),
        ({"shuffle": "no"}, r"shuffle is 'no' \(str\)"),
        ({"accept": ["x"]}, "accept.* 'x'"),
        ({"rows": "x"}, "rows"),
    ],
)
def test_values_a_loader_cannot_use(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        kdcache.Loader(data=Data(), batch_size=4, **options)
    if "workers" in options:
        for call in (
            lambda: kdcache.train_student(
                student=nn.Linear(4, 3),
                data=Data(),
                alpha=0,
                epochs=1,
                out="x",
                dry_run=True,
                **options,
            ),
            lambda: evaluate(nn.Linear(4, 3), Data(), **options),
        ):
            with pytest.raises(UsageError, match=said):
                call()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512 MB", 512 * 10**6),
        ("1.5GiB", 3 * 2**29),
        (" 7 ", 7),
        ("2kb", 2000),
        ("0.5", 0),
        ("0 MB", 0),
        ("much", None),
        ("", None),
        ("MB", None),
        ("-1", None),
        ("1.", None),
        (".5 GB", None),
        ("1 2", None),
        ("1 TB", None),
        ("1e3", None),
        ("\u0667 MB", None),
        ("1" * 19, None),
        ("1." + "0" * 19, None),
    ],
)
def test_sizes_are_read(text: str, expected: int | None) -> None:
    assert bytes_of(text) == expected
