"""Models by SPEC: what is loaded, what is refused, what is saved can be opened again; forward and
its refusals.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from argparse import Namespace
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from student_world import equal_weights
from torch import nn

from kdcache.errors import DataError, UsageError
from kdcache.models.fingerprint import weights_digest
from kdcache.models.model import find_module, forward, load_model
from kdcache.models.weights import load_weights
from kdcache.process.signals import Interrupted

MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, num_classes=3):
        super().__init__()
        self.num_classes = num_classes
        self.body, self.head = nn.Linear(2, width), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))

def fixed(width=4):
    return Net(width, 7)

instance = nn.Linear(2, 2)
number = 5
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_random_weights_are_a_function_of_the_seed_and_leave_the_generators_alone(mine):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    wanted = torch.rand(()), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    model = load_model(f"{mine}:Net", seed=3)
    assert (torch.rand(()), np.random.rand(), random.random()) == wanted
    torch.manual_seed(3)
    # what the user gets by torch.manual_seed(3)
    assert equal_weights(model.module, type(model.module)())
    assert equal_weights(model.module, load_model(f"{mine}:Net", seed=3).module)
    assert not equal_weights(model.module, load_model(f"{mine}:Net", seed=4).module)
    assert model.loaded == f"random weights, seed 3, by {mine}:Net"


def test_arguments_and_classes(mine):
    model = load_model(f"{mine}:Net", args={"width": 6}, num_classes=9)
    assert model.module.head.weight.shape == (9, 6) and model.num_classes == 9
    assert load_model(f"{mine}:Net", args={"num_classes": 2}, num_classes=9).num_classes == 2
    # takes no num_classes
    assert load_model(f"{mine}:fixed", num_classes=9).num_classes == 7
    assert load_model(f"{mine}:instance").loaded == f"the module {mine}:instance as it is"
    assert load_model(f"{mine}:instance").num_classes is None
    assert load_model(
        "torch.nn:Linear", args={"in_features": 2, "out_features": 3}
    ).module.weight.shape == (3, 2)
    assert load_model(f"{mine}:Net", dtype="bfloat16").module.head.weight.dtype == torch.bfloat16
    for spec, args, message in [
        (f"{mine}:Net", {"widht": 1}, r"takes no argument 'widht' \(did you mean 'width'\?\)"),
        (f"{mine}:instance", {"a": 1}, "is a Linear, not a function"),
        (f"{mine}:number", {}, "gave a int; expected a torch.nn.Module"),
        (
            "timmm:resnet18",
            {},
            r"did you mean 'timm'\?\).* expected one of hf:PATH_OR_ID, hf-config:PATH",
        ),
        ("resnet18", {}, "no such model SPEC; expected one of"),
        ("hf:", {}, "expected hf:PATH_OR_ID"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_model(spec, args=args)
    with pytest.raises(UsageError, match=r"dtype is 'flot32' \(did you mean 'float32'"):
        load_model(f"{mine}:Net", dtype="flot32")


def test_the_digest_is_of_names_dtypes_shapes_and_bytes(mine):
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
        module.bias.copy_(torch.tensor([3.0]))
    written = b"".join(
        struct.pack("<I", len(name))
        + name
        + struct.pack("<I", 7)
        + b"float32"
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack(f"<{len(values)}f", *values)
        for name, shape, values in ((b"bias", (1,), (3,)), (b"weight", (1, 2), (1, 2)))
    )
    assert weights_digest(module) == "sha256-state-dict:" + hashlib.sha256(written).hexdigest()
    digests = {weights_digest(module), weights_digest(module.to(torch.bfloat16))}
    module.weight.data[0, 0] += 1
    digests |= {
        weights_digest(module),
        weights_digest(nn.Sequential(OrderedDict(inner=module))),
        weights_digest(nn.BatchNorm1d(2)),
    }
    assert len(digests) == 5
    model = load_model(f"{mine}:Net", dtype="float16")
    modules = {
        "": "Net()",
        "body": "Linear(in_features=2, out_features=4, bias=True)",
        "head": "Linear(in_features=4, out_features=3, bias=True)",
    }
    assert model.identity == {
        "weights": weights_digest(model.module),
        "dtype": "float16",
        "adapters": "",
        "preprocessing": "",
        "num_classes": 3,
        "modules": modules,
    }
    with pytest.raises(UsageError, match="_extra_state"):
        weights_digest(_WithExtraState())


class _WithExtraState(nn.Module):
    def get_extra_state(self):
        return "text"


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "folder", "wrapped"])
def test_weights_come_back(mine, tmp_path, suffix):
    source = load_model(f"{mine}:Net", seed=1).module
    file = tmp_path / {"folder": "model.safetensors", "wrapped": "w.pt"}.get(suffix, f"w.{suffix}")
    if file.suffix == ".safetensors":
        save_file(source.state_dict(), file)
    else:
        torch.save(
            {"state_dict": source.state_dict(), "step": 3}
            if suffix == "wrapped"
            else source.state_dict(),
            file,
        )
    model = load_model(f"{mine}:Net", weights=tmp_path if suffix == "folder" else file, seed=2)
    said = ", of its 'state_dict'" * (suffix == "wrapped")
    assert equal_weights(model.module, source) and model.loaded == f"weights from {file}{said}"


def test_weights_that_do_not_fit(mine, tmp_path):
    module = load_model(f"{mine}:Net").module
    state = module.state_dict()
    state["head.weight"], state["extra"] = torch.zeros(9, 4), torch.zeros(1)
    del state["body.bias"]
    save_file(state, tmp_path / "w.safetensors")
    before = weights_digest(module)
    with pytest.raises(
        UsageError,
        match=r"does not fit Net: 1 missing: body.bias; 1 unexpected: extra; "
        r"1 of another shape: head.weight \(9, 4\), expected \(3, 4\)",
    ):
        load_weights(module, tmp_path / "w.safetensors")
    assert weights_digest(module) == before
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "code.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    for name, message in [
        ("code.pt", r"it holds a torch\.nn\.\S*Linear, and making one may run"),
        ("list.pt", "holds a list; expected a state"),
        ("bad.safetensors", "cannot be read"),
        ("none.pt", "no such file"),
        ("mine.py", r"expected a \.safetensors, .*\.ckpt or \.pth\.tar file"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_weights(module, tmp_path / name)


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    )


# counters are 1 then
STATE = {name: value + 1 for name, value in normed().state_dict().items()}
OTHER = {name: value + 1 for name, value in STATE.items()}
BESIDE = {
    "epoch": 3,
    "arch": "net",
    "optimizer": {"lr": 0.1},
    "args": Namespace(lr=0.1),
    "best_acc": torch.tensor(7.0),
}
FILES = {  # name, what is saved, and what is said of it
    "w.pt": (STATE, ""),
    "pytorch_model.bin": (STATE, ""),
    "timm/model_best.pth.tar": ({**BESIDE, "state_dict": STATE}, ", of its 'state_dict'"),
    "ema.pth": (
        {**BESIDE, "state_dict": STATE, "state_dict_ema": OTHER},
        ", of its 'state_dict', its average 'state_dict_ema' is not used: for that save it alone, "
        "torch.save(checkpoint['state_dict_ema'], FILE)",
    ),
    "average.pth": ({"epoch": 1, "state_dict_ema": STATE}, ", of its 'state_dict_ema'"),
    "model.pth": ({**BESIDE, "model": STATE}, ", of its 'model'"),
    "deep.pth": ({"model": {"state_dict": STATE}, "step": 1}, ", of its 'model.state_dict'"),
    "msd.pt": (
        {"model_state_dict": STATE, "optimizer_state_dict": {"state": {}}},
        ", of its 'model_state_dict'",
    ),
    "own.pt": ({"student": STATE, "epoch": 1}, ", of its 'student'"),
    "ddp.pth": (
        {f"module.{name}": value for name, value in STATE.items()},
        ", without 'module.' before all names",
    ),
    "compiled.pth": (
        {f"_orig_mod.module.{name}": value for name, value in STATE.items()},
        ", without '_orig_mod.module.' before all names",
    ),
    "lightning.ckpt": (
        {"state_dict": {f"model.net.{name}": value for name, value in STATE.items()}, "loops": {}},
        ", of its 'state_dict', without 'model.net.' before all names",
    ),
    "wrapped.pt": (
        {f"student.backbone.{name}": value for name, value in STATE.items()},
        ", without 'student.backbone.' before all names",
    ),
    "swa.pt": (
        {
            "n_averaged": torch.tensor(5),
            **{f"module.{name}": value for name, value in STATE.items()},
        },
        ", without 'module.' before all names",
    ),
    "half.pt": (
        {
            name: value.half() if value.is_floating_point() else value
            for name, value in STATE.items()
        },
        "",
    ),
    "old.pt": (
        {name: value for name, value in STATE.items() if "num_batches" not in name},
        ", without the num_batches_tracked of 2 batch norms, which stay as they are",
    ),
    "old/ddp.pt": (
        {f"module.{name}": value for name, value in STATE.items() if "num_batches" not in name},
        ", without 'module.' before all names, without the num_batches_tracked of 2 batch norms, "
        "which stay as they are",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_as_training_scripts_leave_them(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    saved, said = FILES[name]
    torch.save(saved, tmp_path / name)
    module = normed()
    assert load_weights(module, tmp_path / name) == f"weights from {tmp_path / name}{said}"
    for key, value in module.state_dict().items():
        wanted = (
            torch.tensor(0) if "old" in name and key.endswith("num_batches_tracked") else STATE[key]
        )
        torch.testing.assert_close(value, wanted, atol=2e-3 if name == "half.pt" else 0, rtol=0)


def test_weights_whose_names_begin_like_a_wrapper_and_files_of_several_models(tmp_path):
    module = nn.ModuleDict({"model": nn.Linear(2, 2), "net": nn.Linear(2, 2)})
    own = {name: value + 1 for name, value in module.state_dict().items()}
    torch.save({f"module.{name}": value for name, value in own.items()}, tmp_path / "a.pt")
    load_weights(module, tmp_path / "a.pt")
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    linear = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(linear.state_dict(), tmp_path / "b.pt")
    # its own prefix stays
    assert load_weights(linear, tmp_path / "b.pt") == f"weights from {tmp_path}/b.pt"
    for saved, message in [
        (
            {"teacher": STATE, "student": STATE},
            r"a dict with 'teacher' \(dict\), 'student' \(dict\); expected a",
        ),
        (
            {"state_dict": {**STATE, "note": "hello"}},
            "holds a dict with '0.weight' .*; expected a state_dict",
        ),
        ({"state_dict": {}}, "holds a dict; expected a state_dict"),
        (
            {f"module.{name}": value for name, value in list(STATE.items())[:-1]},
            r"does not fit Sequential: \d+ missing: .* \(and no better without 'module.' before "
            r"all names\)",
        ),
        (
            {"args": SimpleNamespace(a=1), "state_dict": STATE},
            r"it holds a \S+Namespace, and making one may run",
        ),
    ]:
        torch.save(saved, tmp_path / "c.pt")
        with pytest.raises(UsageError, match=message):
            load_weights(normed(), tmp_path / "c.pt")


def test_nothing_in_a_weights_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    for saved in (
        {"args": Trap(), "state_dict": STATE},
        {"args": Namespace(a=Trap()), "state_dict": STATE},
    ):
        torch.save(saved, tmp_path / "trap.pth.tar")
        with pytest.raises(
            UsageError, match=r"it holds a \S*system, and making one may run anything"
        ):
            load_weights(normed(), tmp_path / "trap.pth.tar")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["Net", "Tied"])
def test_what_is_saved_can_be_loaded(mine, tmp_path, name):
    model = load_model(f"{mine}:{name}", seed=1)
    model.save(tmp_path / "out")
    again = load_model(f"{mine}:{name}", weights=tmp_path / "out", seed=2)
    assert equal_weights(model.module, again.module) and again.identity == model.identity
    if name == "Tied":
        assert again.module.head.weight is again.module.embed.weight


def test_what_is_known_of_the_classes_goes_only_to_who_asks_for_it(tmp_path):
    (tmp_path / "f.py").write_text("""
from torch import nn
def anything(**options):
    assert not options, options
    return nn.Linear(2, 3)
def asks(num_classes=3, **options):
    assert not options, options
    return nn.Linear(2, num_classes)
""")
    assert load_model(f"{tmp_path}/f.py:anything", num_classes=7).module.out_features == 3
    assert load_model(f"{tmp_path}/f.py:asks", num_classes=7).module.out_features == 7


def test_submodules_by_name(mine):
    module = nn.Sequential(
        OrderedDict(body=nn.Sequential(nn.Linear(1, 1), nn.ReLU()), head=nn.Linear(1, 1))
    )
    assert find_module(module, "body.1") is module.body[1]
    with pytest.raises(
        UsageError, match=r"Sequential has no module 'boddy.1' \(did you mean 'body.1'"
    ):
        find_module(module, "boddy.1")
    with pytest.raises(UsageError, match="has no module ''"):
        find_module(module, "")


class Answer(nn.Module):
    """Returns what a function of the inputs gives."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **named):
        return self.function(*args, **named)


def test_every_form_of_answer():
    logits, mask = torch.rand(2, 3, 4), torch.tensor([[1, 0, 1], [1, 1, 0]])
    for answer in (logits, {"logits": logits}, SimpleNamespace(logits=logits)):
        out = forward(Answer(lambda x, answer=answer: answer), torch.zeros(2))
        assert out.logits is logits and out.row_mask is None
    for answer in (
        {"logits": logits, "row_mask": mask},
        SimpleNamespace(logits=logits, row_mask=mask.bool()),
    ):
        out = forward(
            Answer(lambda a, b, answer=answer: answer), {"a": torch.zeros(2), "b": torch.zeros(2)}
        )
        assert torch.equal(out.row_mask, mask.bool())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned a NoneType; expected a tensor"),
        ((torch.rand(2, 3),), "returned a tuple"),
        ({"loss": torch.rand(2, 3)}, "returned a dict"),
        (torch.rand(2), r"logits torch.float32 \(2,\) for 2 records"),
        (torch.rand(2, 3, 4, 5), "expected floating point"),
        (torch.rand(3, 4), "for 2 records"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64"),
        (
            {"logits": torch.rand(2, 3), "row_mask": torch.ones(2, 3)},
            r"row_mask \(2, 3\) with logits \(2, 3\)",
        ),
        ({"logits": torch.rand(2, 3, 4), "row_mask": torch.ones(2, 4)}, "row_mask"),
    ],
)
def test_other_answers_are_refused(answer, message):
    with pytest.raises(DataError, match=message):
        forward(Answer(lambda x: answer), torch.zeros(2, 1))


def test_inputs_take_the_dtype_of_the_weights_and_padding_its_mask(mine):
    net = load_model(f"{mine}:Net", dtype="bfloat16").module
    assert forward(net, torch.zeros(2, 2, dtype=torch.float64)).logits.dtype == torch.bfloat16
    tied = load_model(f"{mine}:Tied").module
    ids = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
    }
    assert forward(tied, ids).logits.shape == (2, 3, 5)

    class NoMask(nn.Module):
        def forward(self, input_ids):
            return torch.zeros(*input_ids.shape, 5)

    assert forward(NoMask(), {"input_ids": ids["input_ids"]}).logits.shape == (2, 3, 5)
    with pytest.raises(DataError, match=r"NoMask\.forward takes no attention_mask"):
        forward(NoMask(), ids)


def test_a_signal_while_a_model_is_loaded_is_no_fault_of_the_model(mine, tmp_path, monkeypatch):
    """Also where a library wraps it: transformers does around its late imports."""
    transformers = pytest.importorskip("transformers")

    def interrupted(*args, **options):
        raise Interrupted("SIGINT: go on", 2)

    def wrapped(*args, **options):
        try:
            interrupted()
        except Exception as e:
            raise RuntimeError("failed to import transformers.models.llama") from e

    (tmp_path / "config.json").write_text("{}")
    for fails in (interrupted, wrapped):
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fails)
        with pytest.raises(Interrupted, match=r"^SIGINT: go on$") as caught:
            load_model(f"hf:{tmp_path}")
        assert caught.value.exit_code == 130
    late = tmp_path / "late.py"
    late.write_text(
        "from kdcache.process.signals import Interrupted\nraise Interrupted('SIGTERM: go on', 15)\n"
    )
    with pytest.raises(Interrupted, match="SIGTERM"):
        load_model(f"{late}:Net")
