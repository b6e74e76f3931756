"""Whatever code of users raises, wherever it is touched, is one line that says what was called and
where it broke.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import refused, run
from torch import nn

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.inspect import inspect
from kdcache.process.signals import Interrupted
from kdcache.student.evaluate import evaluate
from kdcache.student.loader import Loader
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher
from kdcache.teacher.verify import verify
from kdcache.user.code_errors import callback, entrance, printable, users_code

HERE = Path(__file__).name


class Boom(Exception):
    pass


class Mute(Exception):
    """Its message cannot be read either."""

    def __str__(self) -> str:
        raise Boom


def raising(error: BaseException) -> Callable[..., Any]:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raises


class Base:
    name, revision = "base", "1"

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        return torch.arange(4.0) + i, i % 3


def data(**over: Any) -> Any:
    return type("Given", (Base,), over)()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


def net(**over: Any) -> nn.Module:
    made: nn.Module = type("Given", (Net,), over)()
    return made


# What each command does with a dataset and a model; `good` is a cache of Base by Net.
def commands(
    good: Path, tmp_path: Path, dataset: Any, module: nn.Module, again: bool = True
) -> Iterator[tuple[str, Callable[[], object]]]:
    out = tmp_path / "out"
    yield (
        "dump",
        lambda: dump_teacher(teacher=module, data=dataset, out=out, device="cpu", batch_size=4),
    )
    yield (
        "train",
        lambda: train_student(
            student=module,
            data=dataset,
            alpha=0,
            epochs=1,
            batch_size=4,
            device="cpu",
            out=tmp_path / "run",
        ),
    )
    yield "evaluate", lambda: evaluate(module, dataset, device="cpu")
    if again:
        yield "verify", lambda: verify(good, teacher=module, data=dataset, device="cpu")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "cache"
    dump_teacher(teacher=Net(), data=Base(), out=path, device="cpu", say=lambda _: None)
    return path


def one_line(call: Callable[[], object], what: str) -> KDCacheError:
    """The error of a call: ours, in one line that tells where in this file it came from."""
    with pytest.raises(KDCacheError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and said.isprintable(), (what, said)
    return caught.value


PLACES = (
    "__len__",
    "__getitem__",
    "name",
    "revision",
    "class_names",
    "window",
    "tokenizer_identity",
    "token_lengths",
    "key",
    "view",
    "collate_fn",
    "pure_items",
)
PROPERTIES = (
    "name",
    "revision",
    "class_names",
    "window",
    "tokenizer_identity",
    "token_lengths",
    "pure_items",
)


@pytest.mark.parametrize("place", [*PLACES, "property key", "property view", "property collate_fn"])
def test_a_dataset_that_raises(good: Path, tmp_path: Path, place: str) -> None:
    name = place.removeprefix("property ")
    raises = raising(Boom("here\nand more\x1b[31m"))
    given = data(**{name: property(raises) if name in PROPERTIES or name != place else raises})
    for what, call in commands(good, tmp_path, given, Net()):
        said = str(one_line(call, what))
        assert "Boom: here" in said and f"({HERE}, line " in said, (what, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "place",
    [
        "forward",
        "train",
        "to",
        "state_dict",
        "named_modules",
        "parameters",
        "modules",
        "property num_classes",
        "property config",
        "property peft_config",
    ],
)
def test_a_model_that_raises(good: Path, tmp_path: Path, place: str) -> None:
    name, raises = place.removeprefix("property "), raising(Boom("here"))
    module = net(**{name: property(raises) if name != place else raises})
    seen = 0
    for what, call in commands(good, tmp_path, Base(), module):
        try:
            call()
        except KDCacheError as e:  # not every command touches all of a model
            seen += 1
            assert "Boom: here" in str(e) and f"({HERE}, line " in str(e) and "\n" not in str(e), (
                what,
                str(e),
            )
    assert seen >= 1


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(0),
        SystemExit("bye"),
        GeneratorExit(),
        StopIteration(),
        BaseException("b"),
        MemoryError(),
        RecursionError("deep"),
        Mute(),
        KeyError("k"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "odd"),
        OSError(5, "EIO"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_every_kind_of_error(good: Path, tmp_path: Path, error: BaseException) -> None:
    """In an item (by a worker process too), in a forward pass, in a collate function."""
    given = data(__getitem__=raising(error))
    calls = [
        *commands(good, tmp_path, given, Net()),
        *commands(good, tmp_path, Base(), net(forward=raising(error))),
    ]
    calls += commands(good, tmp_path, data(collate_fn=raising(error)), Net())
    for what, call in calls:
        if "verify" in what and not isinstance(error, Exception):
            continue
        found = verify_problem(call) if what == "verify" else str(one_line(call, what))
        assert type(error).__name__ in found and HERE in found, (what, found)


def verify_problem(call: Callable[[], Any]) -> str:
    """verify lists what the data or the teacher did wrong, or raises it."""
    try:
        return "; ".join(call().problems)
    except KDCacheError as e:
        return str(e)


def test_sys_exit_in_a_file_of_users_is_an_error_of_exit_code_1(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text("import sys\nsys.exit(0)\n")
    for spec in (file, tmp_path / "main.py"):
        spec.write_text(file.read_text())
        result = run(
            "dump-teacher", "--teacher", f"{spec}:Net", "--data", "digits", "--out", tmp_path / "c"
        )
        refused(result, 1, spec.name, "sys.exit(0)", "line 2", "__main__")
    file.write_text(
        "import sys\nclass Data:\n    def __len__(self): return 3\n    def __getitem__(self, i): "
        "sys.exit()\nfrom torch import nn\nNet = lambda: nn.Linear(2, 3)\nClosing = lambda: "
        "sys.exit(3)\n"
    )
    for args in (
        ["--teacher", f"{file}:Net", "--data", f"{file}:Data"],
        ["--teacher", f"{file}:Closing"],
    ):
        more = [] if "--data" in args else ["--data", "digits"]
        refused(
            run("dump-teacher", *args, *more, "--out", tmp_path / "c"),
            1,
            "sys.exit(",
            "user.py, line ",
        )
    refused(
        run("evaluate", "--student", f"{file}:Net", "--data", f"{file}:Data"),
        1,
        "sys.exit(",
        "user.py, line 4",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("__len__", lambda self: -1),
        ("__len__", lambda self: 2.5),
        ("__len__", lambda self: 2**62),
        ("class_names", 5),
        ("window", "x"),
        ("window", -5),
        ("window", 2.7),
        ("window", float("nan")),
        ("window", [1]),
        ("tokenizer_identity", "x"),
        ("tokenizer_identity", {"a": 1.5}),
        ("tokenizer_identity", {"a": object()}),
        ("tokenizer_identity", [1]),
        ("tokenizer_identity", {1: 2}),
        ("token_lengths", [1, 2]),
        ("token_lengths", "x"),
        ("token_lengths", np.full(12, np.nan)),
        ("token_lengths", np.full(12, -1)),
        ("token_lengths", object()),
        ("name", "x" * 10**6),
        ("name", "a\0b"),
        ("name", "\ud800"),
        ("name", "\x1b]0;title\x07"),
        ("key", lambda self: 1),
        ("key", lambda self, i: "zz"),
        ("view", lambda self, i: 1),
        ("collate_fn", lambda self: 1),
        ("collate_fn", lambda self, items: None),
        ("__getitem__", lambda self, i: (torch.zeros(4).to_sparse(), 1)),
        ("__getitem__", lambda self, i: (torch.zeros(4, device="meta"), 1)),
        ("__getitem__", lambda self, i: (torch.zeros(4, dtype=torch.float8_e4m3fn), 1)),
        # a length beyond the last sample
        ("__getitem__", lambda self, i: (torch.zeros(4), 1) if i < 11 else [][i]),
    ],
)
def test_values_that_both_stages_refuse(good: Path, tmp_path: Path, name: str, value: Any) -> None:
    for what, call in commands(good, tmp_path, data(**{name: value}), Net()):
        one_line(call, what)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "made",
    [
        lambda z: z.to_sparse(),
        lambda z: z.to("meta"),
        lambda z: z.to(torch.float8_e4m3fn),
        lambda z: z.to(torch.cfloat),
        lambda z: {"logits": z[:, None], "row_mask": "x"},
        lambda z: z.long(),
        lambda z: None,
        lambda z: z[:1],
    ],
    ids=["sparse", "meta", "float8", "complex", "mask", "integers", "none", "short"],
)
def test_logits_that_are_none(
    good: Path, tmp_path: Path, made: Callable[[torch.Tensor], Any]
) -> None:
    module = net(forward=lambda self, x: made(self.body(x)))
    for what, call in commands(good, tmp_path, Base(), module, again=False):
        one_line(call, what)
    assert verify(good, teacher=module, data=Base(), device="cpu").problems


def test_callbacks(good: Path, tmp_path: Path) -> None:
    def trained(**more: Any) -> Callable[[], object]:
        return lambda: train_student(
            student=Net(),
            cache=good,
            data=Base(),
            epochs=1,
            device="cpu",
            out=tmp_path / f"run{id(more)}",
            **more,
        )

    def dumped(**more: Any) -> Callable[[], object]:
        return lambda: dump_teacher(
            teacher=Net(), data=Base(), out=tmp_path / "c", device="cpu", **more
        )

    for name, call in [
        ("on_step", trained(on_step=raising(Boom("x")))),
        ("say", trained(say=raising(Boom("x")))),
        ("on_metrics", trained(on_metrics=raising(Boom("x")))),
        ("progress", dumped(progress=raising(Boom("x")))),
        ("say", dumped(say=raising(Boom("x")))),
        ("progress", lambda: verify(good, progress=raising(Boom("x")))),
        ("say", trained(say=raising(SystemExit(2)))),
    ]:
        said = str(one_line(call, name))
        assert said.startswith(f"{name}: ") and HERE in said

    class Out(BaseException):
        pass

    with pytest.raises(Out):  # a way out that a caller made for this very end
        trained(on_step=raising(Out()))()


def test_hooks_and_own_backward_passes(good: Path, tmp_path: Path) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            raise Boom("in backward")

    hooked = Net()
    hooked.body.register_forward_hook(raising(Boom("in a hook")))
    for module, words in (
        (net(forward=lambda self, x: Bad.apply(self.body(x))), "in backward"),
        (hooked, "in a hook"),
    ):
        call = partial(
            train_student,
            student=module,
            cache=good,
            data=Base(),
            epochs=1,
            device="cpu",
            out=tmp_path / words,
        )
        said = str(one_line(call, words))
        assert words in said and HERE in said
    said = str(
        one_line(
            lambda: next(iter(Loader(good, Base(), batch_size=4, live_teacher=hooked))), "live"
        )
    )
    assert said.startswith("the live teacher (Net) cannot be run") and "in a hook" in said
    said = str(
        one_line(lambda: inspect(good, record=0, data=data(key=raising(Boom("k")))), "inspect")
    )
    assert "key(0)" in said and "Boom: k" in said


def test_a_model_on_several_devices_is_not_moved(good: Path, tmp_path: Path) -> None:
    spread, offloaded = net(hf_device_map={"body": 0, "head": "cpu"}), Net()
    offloaded.body = nn.Linear(4, 3, device="meta")
    for module, words in (
        (spread, "the devices 0, cpu"),
        (offloaded, "'body.weight' on the device meta"),
    ):
        for what, call in commands(good, tmp_path, Base(), module):
            found = one_line(call, what)
            assert (
                isinstance(found, UsageError) and words in str(found) and "device_map" in str(found)
            )


def test_what_passes_and_what_does_not() -> None:
    # ignored, where the tests run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(DataError, match=r"^ours$"), users_code("x"):
        raise DataError("ours")
    # pytest leaves Python's own handler of Ctrl-C
    with pytest.raises(KeyboardInterrupt), users_code("x"):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KDCacheError, match="x: KeyboardInterrupt"), users_code("x"):
            raise KeyboardInterrupt  # not of a signal: Python would not raise it
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(Interrupted), users_code("x"):
        try:
            raise Interrupted("SIGTERM: go on", signal.SIGTERM)
        except Interrupted:
            raise RuntimeError("wrapped by a library") from None
    assert callback("x", None) is None


def test_a_bug_of_ours_stays_one() -> None:
    import kdcache.loss.topk

    ours = entrance(lambda: kdcache.loss.topk.exact_topk(None, 1))  # type: ignore[arg-type]
    code = ours.__wrapped__.__code__.replace(co_filename=kdcache.loss.topk.__file__)  # type: ignore[attr-defined]
    ours.__wrapped__.__code__ = code  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        ours()


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[31m\x07\ud800\x9b é") == r"a\x1b[31m\x07\ud800\x9b é"
