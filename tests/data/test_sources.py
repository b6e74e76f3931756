"""Data SPECs on real and on hostile files; code by name; arguments that do not fit."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest
import torch
import xxhash

from kdcache.data.code_specs import call, parse_args, resolve
from kdcache.data.identify import identify
from kdcache.data.samples import Samples, as_tensor
from kdcache.data.sources import load_data
from kdcache.data.text import fingerprint
from kdcache.errors import DataError, NotBuilt, UsageError


def test_arguments_are_json_or_text():
    assert parse_args(
        ["a=1", "b=true", "c=[1, 2]", "d=text", "e=", 'f="5"', "g-h=0.5", "i=a=b"]
    ) == {"a": 1, "b": True, "c": [1, 2], "d": "text", "e": "", "f": "5", "g_h": 0.5, "i": "a=b"}
    for bad, message in (
        (["a"], "expected key=value"),
        (["=1"], "key=value"),
        (["a=1", "a=2"], "a is given twice"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_args(bad)


def test_code_by_name(tmp_path):
    file = tmp_path / "mine.py"
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 5\n")
    file.write_text(
        "import neighbour_of_mine\nCOUNT = []\ndef make(n, *, label=0):\n    return [(float(i), "
        "label) for i in range(n)]\ndef broken():\n    raise ValueError('no such\\n"
        "thing')\n"
    )
    assert resolve(f"{file}:make") is resolve(f"{file}:make")  # the file runs once
    assert load_data(f"{file}:make", {"n": 2, "label": 1}) == [(0.0, 1), (1.0, 1)]
    assert load_data(f"{file}:COUNT") == []
    for spec, args, message in [
        (f"{file}:mak", {}, r"has no 'mak' \(did you mean 'make'\?\)"),
        (f"{tmp_path}/other.py:make", {}, "no such file"),
        (f"{file}:make", {}, "needs n: give n="),
        (
            f"{file}:make",
            {"n": 1, "lable": 2},
            r"takes no argument 'lable' \(did you mean 'label'\?\)",
        ),
        (f"{file}:broken", {}, r"ValueError: no such \(mine.py, line 6\)"),
        (f"{file}:COUNT", {"n": 1}, "is a list, not a function"),
        ("collections:OrderedDict.x", {}, "no such data SPEC"),
        ("no_such_package.part:name", {}, "no module 'no_such_package'"),
        ("json:nothing", {}, "json has no 'nothing'"),
        ("math:pi", {}, "gave a float; expected a dataset"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_data(spec, args)
    assert isinstance(resolve("collections:OrderedDict")(), dict)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", r"SyntaxError"),
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("1 / 0\n", r"ZeroDivisionError: division by zero \(bad.py, line 1\)"),
    ],
)
def test_files_that_do_not_run(tmp_path, monkeypatch, source, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(UsageError, match=r"bad.py could not be run: " + message):
        resolve(f"{tmp_path}/bad.py:f")
    (tmp_path / "bad_named_module.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(UsageError, match=r"module bad_named_module could not be imported"):
        resolve("bad_named_module:f")


def test_call_looks_at_the_signature():
    # ignored, where the tests run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert call(lambda **anything: anything, {"a": 1}, where="f") == {"a": 1}
    with pytest.raises(UsageError, match="f takes 'a' by position only"):
        call(lambda a, /: a, {}, where="f")
    with pytest.raises(DataError, match="as it is"):
        call(_raise, {"error": DataError("as it is")}, where="f")
    with pytest.raises(KeyboardInterrupt):
        call(_raise, {"error": KeyboardInterrupt()}, where="f")


def _raise(error):
    raise error


def test_specs_that_are_not_there():
    for spec in ("jsonl:a", "parquet:a", "dataset:a"):
        with pytest.raises(NotBuilt, match="is not built yet; there are digits, imagefolder:PATH"):
            load_data(spec)
    with pytest.raises(
        UsageError, match=r"no such data SPEC \(did you mean 'digits'\?\); expected one of digits, "
    ):
        load_data("digit")
    with pytest.raises(UsageError, match=r"did you mean 'imagefolder'\?\)"):
        load_data("imgfolder:/data/x")
    with pytest.raises(UsageError, match="data text:: expected text:GLOB"):
        load_data("text:")
    with pytest.raises(UsageError, match=r"data digits:x: expected digits$"):
        load_data("digits:x")
    with pytest.raises(
        UsageError, match=r"data digits takes no argument 'splt' \(did you mean 'split'\?\)"
    ):
        load_data("digits", {"splt": "train"})


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    bunch = sklearn.load_digits()
    train, test, every = (
        load_data("digits", {"split": split}) for split in ("train", "test", "all")
    )
    assert (len(train), len(test), len(every)) == (1437, 360, 1797) and len(
        load_data("digits")
    ) == 1437
    for dataset, at in ((train, 1436), (test, 359), (every, 1796)):
        x, y = dataset[at]
        source = at + 1437 * (dataset is test)
        assert x.shape == (1, 8, 8) and x.dtype == torch.float32
        assert (
            np.array_equal(x[0].numpy() * 16, bunch.images[source])
            and int(y) == bunch.target[source]
        )
    assert train.name == "digits" and train.class_names == list("0123456789")
    assert len({train.revision, test.revision, every.revision}) == 3
    assert train.revision == load_data("digits", {"split": "train"}).revision
    with pytest.raises(UsageError, match=r"no split 'tain' \(did you mean"):
        load_data("digits", {"split": "tain"})
    assert identify(Samples(train)) == identify(Samples(load_data("digits")))


def test_npz(tmp_path):
    x, y = np.random.default_rng(0).random((4, 3)), np.arange(4, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=y, class_names=np.array(["p", "q"]))
    data = load_data(f"npz:{tmp_path}/a.npz")
    assert len(data) == 4 and data.class_names == ["p", "q"]
    assert torch.equal(data[2][0], torch.from_numpy(x[2])) and Samples(data).item(2).labels == 2
    np.savez_compressed(tmp_path / "b.npz", y=y, x=x)
    # of the content, not of the file
    assert load_data(f"npz:{tmp_path}/b.npz").revision == data.revision
    np.savez(tmp_path / "c.npz", input_ids=np.ones((2, 5), np.int32), labels=np.zeros((2, 5), int))
    item = Samples(load_data(f"npz:{tmp_path}/c.npz")).item(1)
    assert item.inputs["input_ids"].shape == (5,) and item.labels.shape == (5,)
    np.savez(tmp_path / "d.npz", x=x)
    assert load_data(f"npz:{tmp_path}/d.npz")[0][1] is None


WIDENED = ("uint16", "uint32", "uint64", ">i4", ">u2", ">f4", "uint8", "int8", "bool", "<i8")


@pytest.mark.parametrize("dtype", WIDENED)
def test_numbers_of_any_width_and_byte_order_train_and_keep_their_key(tmp_path, dtype):
    """Both stages, with the array as labels and as token ids; the key is that of the same numbers
    as int64.
    """
    from teacher_world import Speaker, mlp

    import kdcache

    x = np.random.default_rng(0).normal(size=(8, 6)).astype(">f4" if dtype == ">f4" else "f4")
    if dtype == ">f4":
        cases = [({"x": x}, lambda: mlp(2))]
    else:
        cases = [({"x": x, "y": (np.arange(8) % 2).astype(dtype)}, lambda: mlp(2))]
    if dtype not in (">f4", "bool"):
        cases.append(({"input_ids": np.arange(40).reshape(8, 5).astype(dtype)}, Speaker))
    for i, (arrays, net) in enumerate(cases):
        odd, cache = f"npz:{tmp_path}/odd.npz", tmp_path / f"c{i}"
        np.savez(tmp_path / "odd.npz", **arrays)
        np.savez(
            tmp_path / "plain.npz",
            **{
                name: array.astype("f4" if array.dtype.kind == "f" else "i8")
                for name, array in arrays.items()
            },
        )
        keys = [
            Samples(load_data(spec)).sample_key(3) for spec in (odd, f"npz:{tmp_path}/plain.npz")
        ]
        assert keys[0] == keys[1]
        kdcache.dump_teacher(teacher=net(), data=odd, out=cache, device="cpu", values="float32")
        kdcache.train_student(
            student=net(),
            data=odd,
            cache=cache,
            out=tmp_path / f"r{i}",
            max_steps=2,
            device="cpu",
            batch_size=4,
        )

        class Own:  # and of a dataset that is no file
            name, revision = "own", "1"

            def __len__(self):
                return 8

            def __getitem__(self, n, arrays=arrays):
                item = {name: array[n] for name, array in arrays.items()}
                return item if "input_ids" in item else (item["x"], item.get("y"))

        kdcache.dump_teacher(teacher=net(), data=Own(), out=tmp_path / f"own{i}", device="cpu")


def test_a_uint64_that_no_tensor_of_a_model_can_hold_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2), "f4"), y=np.array([0, 2**63, 1], np.uint64))
    with pytest.raises(DataError, match=r"array 'y' has a uint64 of 2\^63 or more"):
        load_data(f"npz:{tmp_path}/a.npz")
    for value in (np.array([2**63], np.uint64), torch.from_numpy(np.array([2**64 - 1], np.uint64))):
        with pytest.raises(DataError, match=r"'ids' has a uint64 of 2\^63 or more"):
            as_tensor(value, "ids")
    assert as_tensor(np.array([2**63 - 1], np.uint64), "ids").tolist() == [2**63 - 1]


def test_members_of_an_npz_file_that_are_no_arrays_are_refused(tmp_path):
    import zipfile

    for name, content in (
        ("notes.txt", b"hello"),
        ("x.npy", b"no header"),
        ("deep/x.npy", b"\x93NUMPY\x01\x00"),
    ):
        np.savez(tmp_path / "a.npz", x=np.zeros(3))
        with zipfile.ZipFile(tmp_path / "a.npz", "w" if name == "x.npy" else "a") as file:
            file.writestr(name, content)
        with pytest.raises(DataError, match=r"is no \.npz file of plain arrays") as caught:
            load_data(f"npz:{tmp_path}/a.npz")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([{}], object)}, "no .npz file of plain arrays"),
        ({"x": np.zeros(2, np.longdouble)}, "expected numbers of at most 64 bits"),
        ({"x": np.zeros(2, [("a", "i4")])}, "expected numbers of at most 64 bits"),
        ({"x": np.zeros(2, "M8[s]")}, "expected numbers of at most 64 bits"),
        (
            {"x": np.zeros(2), "class_names": np.array("a")},
            r"class_names is <U1 \[\]; expected strings",
        ),
        (
            {"x": np.zeros(2), "class_names": np.arange(2)},
            r"class_names is int64 \[2\]; expected strings",
        ),
        ({"x": np.zeros(2), "y": np.zeros(3)}, "differ in length"),
        ({"x": np.zeros(2), "z": np.zeros(2)}, r"has x and also \['z'\]"),
        ({"x": np.float64(3)}, "expected one or more"),
        ({}, "expected one or more"),
        (
            {"x": np.zeros((2, 3)), "y": np.array(["cat", "dog"])},
            "the array 'y' is of dtype <U3; expected numbers",
        ),
        (
            {"x": np.zeros((2, 3), complex)},
            "the array 'x' is of dtype complex128; expected numbers",
        ),
    ],
)
def test_npz_files_that_cannot_be_used(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(f"npz:{tmp_path}/a.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"text", b"\x93NUMPY"])
def test_npz_files_that_are_none(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"no \.npz file"):
        load_data(f"npz:{tmp_path}/a.npz")
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match="single array"):
        load_data(f"npz:{tmp_path}/a.npy")
    with pytest.raises(UsageError, match="no such file"):
        load_data(f"npz:{tmp_path}/b.npz")


@pytest.fixture
def pictures(tmp_path):
    """Two classes of PNGs, 40 x 20; each is a horizontal ramp whose left edge tells which it is."""
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name / "deep").mkdir(parents=True)
        for at, file in enumerate(("b.png", "a.png", "deep/c.PNG")):
            pixels = np.linspace(20 * label + 5 * at, 255, 40).astype(np.uint8)
            image.fromarray(np.broadcast_to(pixels[None, :, None], (20, 40, 3)).copy()).save(
                tmp_path / name / file
            )
        (tmp_path / name / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_imagefolder(pictures):
    data = load_data(f"imagefolder:{pictures}", {"size": [10, 20]})
    assert data.class_names == ["cat", "dog"] and len(data) == 6
    assert [(file.relative_to(pictures).as_posix(), label) for file, label in data.files] == [
        ("cat/a.png", 0),
        ("cat/b.png", 0),
        ("cat/deep/c.PNG", 0),
        ("dog/a.png", 1),
        ("dog/b.png", 1),
        ("dog/deep/c.PNG", 1),
    ]
    x, y = data[1]
    assert (
        x.shape == (3, 10, 20)
        and x.dtype == torch.float32
        and y == 0
        and 0 <= x.min()
        and x.max() <= 1
    )
    assert torch.equal(data[1][0], x) and bool((x[0, 0].diff() > 0).all())
    content = data.files[4][0].read_bytes()
    assert data.key(4) == xxhash.xxh3_64_intdigest(content + (1).to_bytes(8, "little"))
    square = load_data(f"imagefolder:{pictures}", {"size": 20})[1][0]
    # the middle half of the ramp, not the whole squeezed
    assert square.shape == (3, 20, 20)
    assert torch.allclose(square[0, 0] * 255, torch.linspace(0, 255, 40)[10:30], atol=1)
    scaled = load_data(
        f"imagefolder:{pictures}", {"size": [10, 20], "mean": [0.5, 0, 0], "std": [0.5, 1, 2]}
    )[1][0]
    expected = (x - torch.tensor([0.5, 0, 0])[:, None, None]) / torch.tensor([0.5, 1, 2])[
        :, None, None
    ]
    torch.testing.assert_close(scaled, expected)
    samples = Samples(data)
    item = samples.item(4)
    assert item.sample_key == data.key(4) and item.view_key is not None


def test_imagefolder_views(pictures):
    plain = Samples(load_data(f"imagefolder:{pictures}", {"size": 16}))
    samples = Samples(load_data(f"imagefolder:{pictures}", {"size": 16, "augment": True}), seed=1)
    again = Samples(load_data(f"imagefolder:{pictures}", {"size": 16, "augment": True}), seed=1)
    inputs = {(i, v): samples.item(i, v).inputs for i in range(6) for v in range(8)}
    assert all(
        torch.equal(again.item(i, v).inputs, inputs[i, v]) for i, v in reversed(list(inputs))
    )
    assert len({x.numpy().tobytes() for x in inputs.values()}) == len(inputs)
    rising = [bool(x[0, 8, -1] > x[0, 8, 0]) for x in inputs.values()]
    assert any(rising) and not all(rising)  # mirrored, sometimes
    assert all(0 <= x.min() and x.max() <= 1 and x.shape == (3, 16, 16) for x in inputs.values())
    assert samples.item(0, 3).sample_key == plain.item(0).sample_key
    assert samples.item(0, 3).view_key != samples.item(0, 4).view_key
    assert identify(samples)[0] == identify(plain)[0]


def test_imagefolder_that_cannot_be_used(pictures, tmp_path_factory):
    (pictures / "cat" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a.png cannot be decoded: UnidentifiedImageError"):
        load_data(f"imagefolder:{pictures}")[0]
    with pytest.raises(UsageError, match="no such folder"):
        load_data(f"imagefolder:{pictures}/none")
    with pytest.raises(DataError, match=r"has no images; expected folders .*found no folder"):
        load_data(f"imagefolder:{tmp_path_factory.mktemp('empty')}")
    for args, message in [
        ({"size": 0}, "size is 0"),
        ({"size": [1]}, "size is"),
        ({"augment": "yes"}, "true or false"),
        ({"mean": 0.5}, "three numbers"),
        ({"std": [1, 0, 1]}, "above 0"),
        ({"mean": "a"}, "three"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_data(f"imagefolder:{pictures}", args)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of text files and a byte-level BPE trained on them."""
    tokenizers = pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["def", "return", "self", "import", "value", "numpy", "x", "=", "(", ")"]
    for at in range(30):
        file = root / "texts" / f"{'ab'[at % 2]}" / f"{at:02d}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(rng.choice(words, size=3 + 4 * at)))
    (root / "texts" / "empty.py").write_text("")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train(
        [str(file) for file in (root / "texts").rglob("*.py")], vocab_size=300, show_progress=False
    )
    tokenizer.save(str(root / "tokenizer.json"))
    return root


def test_text_windows_cover_each_document_alone(corpus):
    from tokenizers import Tokenizer

    data = load_data(
        f"text:{corpus}/texts/**/*.py", {"tokenizer": f"{corpus}/tokenizer.json", "window": 16}
    )
    tokenizer = Tokenizer.from_file(f"{corpus}/tokenizer.json")
    files = sorted(
        (corpus / "texts").rglob("*.py"),
        key=lambda file: file.relative_to(corpus / "texts").as_posix(),
    )
    expected = []
    for file in files:
        ids = tokenizer.encode(file.read_text()).ids
        expected += [
            (ids[at : at + 16], int(at == 0)) for at in range(0, len(ids), 16) if len(ids) - at >= 2
        ]
    items = [data[i] for i in range(len(data))]
    assert [item["input_ids"].tolist() for item in items] == [ids for ids, _ in expected]
    assert [item["document_start"].tolist() for item in items] == [
        [first] + [0] * (len(ids) - 1) for ids, first in expected
    ]
    assert any(len(ids) < 16 for ids, _ in expected) and data.window == 16
    assert data.vocab_size == tokenizer.get_vocab_size()
    identity, tokenizer_identity = identify(Samples(data))
    assert identity["window"] == 16 and identity["name"] == "text"
    assert tokenizer_identity == {
        "fingerprint": fingerprint(tokenizer),
        "template": "special tokens per document",
        "packing": "per-document",
    }


def test_text_parts_and_identity(corpus, tmp_path):
    def load(pattern="texts/**/*.py", **args):
        return load_data(
            f"text:{corpus}/{pattern}",
            {"tokenizer": f"{corpus}/tokenizer.json", **{"window": 8, **args}},
        )

    def windows(data):
        return [tuple(data[i]["input_ids"].tolist()) for i in range(len(data))]

    every, train, held = (
        load(),
        load(split="train", eval_fraction=0.3),
        load(split="eval", eval_fraction=0.3),
    )
    assert (
        sorted(windows(train) + windows(held)) == sorted(windows(every))
        and len(held)
        and len(train)
    )
    # About three tenths to eval, by a hash of the path below the pattern's folder.
    names = [
        file.relative_to(corpus / "texts").as_posix()
        for file in sorted((corpus / "texts").rglob("*.py"))
        if file.name != "empty.py"
    ]
    of_eval = [name for name in names if xxhash.xxh3_64_intdigest(name.encode()) / 2**64 < 0.3]
    assert windows(held) == [
        window for name in sorted(of_eval) for window in windows(load(f"texts/{name}"))
    ]
    # a last window of one token predicts nothing, and is none
    one = load("texts/a/02.py", window=2**20)
    assert [
        len(window)
        for window in windows(load("texts/a/02.py", window=len(one[0]["input_ids"]) - 1))
    ] == [len(one[0]["input_ids"]) - 1]
    assert len({every.revision, train.revision, held.revision}) == 3
    assert windows(load(max_files=3)) == windows(every)[: len(load(max_files=3))]
    assert windows(load("texts/a/02.py")) and len(load("texts/a/02.py")) < len(load("texts/a/*.py"))
    moved = tmp_path / "elsewhere"
    moved.symlink_to(corpus / "texts")
    same = load_data(
        f"text:{moved}/**/*.py",
        {"tokenizer": str(corpus), "window": 8, "split": "eval", "eval_fraction": 0.3},
    )
    assert windows(same) == windows(held) and same.revision == held.revision  # by relative path


def test_the_fingerprint_is_of_what_the_tokenizer_does(corpus):
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(f"{corpus}/tokenizer.json")
    before = fingerprint(tokenizer)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    assert fingerprint(tokenizer) == before
    tokenizer.add_special_tokens([AddedToken("<s>")])
    assert fingerprint(tokenizer) != before


def test_text_that_cannot_be_used(corpus, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    good = {"tokenizer": f"{corpus}/tokenizer.json"}
    with pytest.raises(
        DataError, match=r"latin.txt: byte 3 is not UTF-8; --data-arg errors=replace"
    ):
        load_data(f"text:{tmp_path}/latin.txt", good)
    assert len(load_data(f"text:{tmp_path}/latin.txt", {**good, "errors": "replace"})) == 1
    for errors in ("strict", "replace", "ignore"):
        # a byte order mark is no text
        for name, mark in (("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")):
            (tmp_path / name).write_bytes(mark + b"return self")
        a, b = (
            load_data(f"text:{tmp_path}/{name}.txt", {**good, "errors": errors})
            for name in ("plain", "marked")
        )
        assert a.revision == b.revision and torch.equal(a[0]["input_ids"], b[0]["input_ids"])
    with pytest.raises(DataError, match="1 files in split 'all' gave no window"):
        load_data(f"text:{tmp_path}/empty.txt", good)
    for pattern, args, message in [
        ("*.txt", {}, "needs tokenizer: give tokenizer="),
        ("*.none", good, "no file matches"),
        ("*.txt", {**good, "windw": 4}, r"takes no argument 'windw' \(did you mean 'window'"),
        ("*.txt", {**good, "window": 1}, "window is 1"),
        ("*.txt", {**good, "max_files": 0}, "max_files is 0"),
        ("*.txt", {**good, "split": "evl"}, "did you mean 'eval'"),
        ("*.txt", {**good, "eval_fraction": 2}, "between 0 and 1"),
        ("*.txt", {**good, "errors": "x"}, "errors is 'x'"),
        ("*.txt", {"tokenizer": f"{tmp_path}/latin.txt"}, "cannot be read"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_data(f"text:{tmp_path}/{pattern}", args)
