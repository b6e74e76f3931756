"""How pictures are prepared: as the model's own folder says, in every command, unless the user says
otherwise.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from text_world import WORDS, tokenizer_file

import kdcache
from kdcache.data.preprocessing import (
    Preprocessing,
    of_folder,
    of_timm,
    of_torchvision,
    read_preprocessing,
)
from kdcache.data.sources import load_data
from kdcache.errors import DataError, IdentityMismatch, UsageError
from kdcache.inspect import inspect
from kdcache.models.model import load_model
from kdcache.models.specs import own_tokenizer
from kdcache.student.evaluate import evaluate
from kdcache.student.loader import Loader
from kdcache.student.train import train_student
from kdcache.teacher.dump import PREPARED_OTHERWISE, dump_teacher
from kdcache.teacher.verify import verify

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
VIT = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "resample": 2,
    **HALF,
}
PROCESSORS = {
    "vit": VIT,
    "vit, old": {
        "feature_extractor_type": "ViTFeatureExtractor",
        "do_normalize": True,
        "do_resize": True,
        "size": 8,
        "resample": 2,
        **HALF,
    },
    "vit, not square": {**VIT, "size": {"height": 8, "width": 12}},
    "deit": {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 10, "width": 10},
        "crop_size": {"height": 8, "width": 8},
        "resample": 3,
    },
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 11},
        "crop_size": 8,
    },
    "convnext": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 14},
        "crop_pct": 0.875,
    },
    "convnext, large": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 384},
    },
    "levit": {
        "image_processor_type": "LevitImageProcessor",
        "size": {"shortest_edge": 14},
        "crop_size": 8,
    },
    "no mean": {**VIT, "do_normalize": False},
}


def folder(
    path: Path,
    processor: dict[str, Any] | None = None,
    seed: int = 0,
    names: list[str] | None = None,
) -> Path:
    """A tiny ViT for 8 x 8 pictures, and what it says of their preparation."""
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_labels=2,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    torch.manual_seed(seed)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i, (height, width) in enumerate([(20, 31), (40, 17), (9, 9), (16, 16)]):
            noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_folders_image_processor_gives_the_same_numbers(
    tmp_path: Path, pictures: Path, name: str
) -> None:
    """Oracle: transformers' own processor, on every picture; and the text that an identity keeps
    means the same.
    """
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    (tmp_path / "m" / "config.json").write_text('{"model_type": "vit"}')
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "m")
    data = load_data(f"imagefolder:{pictures}", {"preprocessing": f"{tmp_path}/m"})
    text = load_data(f"imagefolder:{pictures}", {"preprocessing": data.preprocessing})
    parsed = load_data(f"imagefolder:{pictures}", {"preprocessing": json.loads(data.preprocessing)})
    for i, (file, _) in enumerate(data.files):
        wanted = processor(Image.open(file), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(data[i][0].numpy(), wanted, atol=1e-5)
        assert torch.equal(text[i][0], data[i][0]) and torch.equal(parsed[i][0], data[i][0])


@pytest.mark.parametrize(
    "asked",
    [
        # BGR
        {
            "image_processor_type": "MobileViTImageProcessor",
            "size": {"shortest_edge": 10},
            "crop_size": 8,
        },
        # any size
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 8},
            "do_center_crop": False,
        },
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "size": {"height": 8, "width": 8},
            "rescale_offset": True,
        },
        {**VIT, "do_rescale": False},
        {"image_processor_type": "NoSuchImageProcessor"},
        {"size": "large"},
    ],
)
def test_what_is_not_done_here_is_refused_by_name(
    tmp_path: Path, pictures: Path, asked: dict[str, Any]
) -> None:
    teacher = folder(tmp_path / "t", asked)
    dump = {"teacher": f"hf:{teacher}", "data": f"imagefolder:{pictures}", "device": "cpu"}
    with pytest.raises(
        UsageError, match=r"preprocessor_config\.json (asks for|cannot be read).*preprocessing=none"
    ):
        dump_teacher(**dump, out=tmp_path / "c")
    assert dump_teacher(**dump, out=tmp_path / "d", data_args={"size": 8}).complete
    # nothing to be prepared by it
    assert dump_teacher(**{**dump, "data": Own()}, out=tmp_path / "e").complete
    assert kdcache.open(tmp_path / "e").identity.teacher["preprocessing"] == ""


class Own:
    """Pictures of somebody's own, of whose preparation nothing is known."""

    name = "own"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return torch.full((3, 8, 8), i / 4), i % 2


def test_every_command_prepares_pictures_as_the_teacher_wants_them(
    tmp_path: Path, pictures: Path
) -> None:
    teacher, said = folder(tmp_path / "t", VIT), []
    data, cache = f"imagefolder:{pictures}", tmp_path / "c"
    dumped = {"teacher": f"hf:{teacher}", "data": data, "device": "cpu"}
    report = dump_teacher(**dumped, out=cache, say=said.append)
    assert report.warnings == ()
    words = "stretched to 8 x 8, bilinear, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    assert f"pictures: {words}, as the teacher wants them" in said
    identity = kdcache.open(cache).identity
    assert (
        identity.teacher["preprocessing"]
        == identity.data["preprocessing"]
        == of_folder(teacher).to_text()
    )
    assert verify(cache, teacher=f"hf:{teacher}", data=data, device="cpu").ok
    assert inspect(cache, record=1, data=data)

    # The teacher itself as the student has nothing to learn, if it sees what the teacher saw.
    said = []
    report = train_student(
        student=f"hf:{teacher}",
        cache=cache,
        data=data,
        eval_data=data,
        out=tmp_path / "r",
        alpha=1.0,
        max_steps=1,
        lr=0.0,
        say=said.append,
    )
    assert report.training["kd"] < 1e-6 and not [line for line in said if "preprocessing" in line]
    recorded = tomllib.loads((tmp_path / "r/run.toml").read_text())["recorded"]
    assert recorded["preprocessing"] == identity.data["preprocessing"]
    assert next(iter(Loader(cache, data, batch_size=8)))["inputs"].shape == (8, 3, 8, 8)
    assert evaluate(tmp_path / "r", data) == {
        **evaluate(f"hf:{teacher}", data),
        "step": 1,
        "checkpoint": str(tmp_path / "r/best"),
    }
    with pytest.raises(IdentityMismatch, match=r"data\.preprocessing: cache has"):
        train_student(
            student=f"hf:{teacher}",
            cache=cache,
            data=data,
            data_args={"size": 8},
            out=tmp_path / "n",
            epochs=1,
        )
    # accepted or not: the pictures are others
    with pytest.raises(DataError, match="view_key"):
        train_student(
            student=f"hf:{teacher}",
            cache=cache,
            data=data,
            data_args={"size": 8},
            out=tmp_path / "n",
            epochs=1,
            accept=["data.preprocessing"],
        )

    # what the user says wins, and is warned of
    said = []
    report = dump_teacher(**dumped, data_args={"size": 8}, out=tmp_path / "d", say=said.append)
    assert [code for code, _ in report.warnings] == [
        PREPARED_OTHERWISE
    ] and words in report.warnings[0][1]
    report = dump_teacher(**dumped, data_args={"preprocessing": str(teacher)}, out=tmp_path / "p")
    assert report.warnings == () and report.content_id == kdcache.open(cache).content_id
    other, said = folder(tmp_path / "s", {**VIT, "resample": 3}), []
    train_student(
        student=f"hf-config:{other}",
        cache=cache,
        data=data,
        out=tmp_path / "r2",
        epochs=1,
        say=said.append,
    )
    assert [
        line
        for line in said
        if line.startswith("warning: the student comes with another preprocessing (stret")
    ]


def test_a_run_without_a_cache_is_prepared_as_its_student_wants_and_remembered(
    tmp_path: Path, pictures: Path
) -> None:
    student, data = folder(tmp_path / "s", VIT), f"imagefolder:{pictures}"
    train_student(student=f"hf:{student}", data=data, alpha=0.0, epochs=1, out=tmp_path / "r")
    (tmp_path / "r" / "last" / "preprocessor_config.json").write_text(
        json.dumps({**VIT, "resample": 0})
    )
    said: list[str] = []
    for out, spec, more in (
        ("a", f"hf:{tmp_path}/r/last", {}),
        ("b", f"hf-config:{student}", {"teacher_weights": tmp_path / "r/last/model.safetensors"}),
    ):
        report = dump_teacher(
            teacher=spec, data=data, out=tmp_path / out, device="cpu", say=said.append, **more
        )
        # as it was trained, whatever lies beside it
        assert report.warnings == ()
        assert (
            kdcache.open(tmp_path / out).identity.data["preprocessing"]
            == of_folder(student).to_text()
        )
    train_student(
        student=f"hf:{student}",
        data=data,
        data_args={"size": 8},
        alpha=0.0,
        epochs=1,
        out=tmp_path / "r2",
    )
    with pytest.raises(UsageError, match="size and preprocessing both say"):
        load_data(data, {"size": 8, "preprocessing": str(student)})


def test_a_model_of_the_hub_brings_its_small_files(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    root = tmp_path / "hub" / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    snapshot = folder(root / "snapshots" / ("a" * 40), VIT)
    tokenizer_file(snapshot / "tokenizer.json", WORDS)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for spec in ("hf:org/tiny", "hf-config:org/tiny"):
        model = load_model(spec)
        assert model.home == snapshot and model.preprocessing == of_folder(snapshot).to_text()
        assert own_tokenizer(model.home) == own_tokenizer(snapshot)
        train_student(
            student=spec,
            data=f"imagefolder:{pictures}",
            alpha=0.0,
            epochs=1,
            out=tmp_path / spec[:5],
        )
        recorded = tomllib.loads((tmp_path / spec[:5] / "run.toml").read_text())["recorded"]
        assert recorded["preprocessing"] == model.preprocessing


def test_what_libraries_say_of_their_weights() -> None:
    config = {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_mode": "center",
    }
    expected = Preprocessing(
        size=(224, 224), resize=256, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    assert of_timm(config) == expected and of_timm({**config, "crop_mode": "border"}) is None
    transforms = SimpleNamespace(
        crop_size=[224],
        resize_size=[256],
        interpolation=SimpleNamespace(value="bicubic"),
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    assert of_torchvision(transforms) == expected and of_torchvision(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "preprocessing=nowhere: there is no preprocessor_config.json"),
        (3, "is 3; expected none, a folder"),
        ("{", "is no JSON"),
        ({"sizes": 3}, "expected an object with size and"),
        ({"size": 0}, "size is 0; expected a number of pixels"),
        ({"size": 8, "resize": 4}, "pictures of 4 x 4 have no middle of 8 x 8"),
        ({"size": 8, "interpolation": "cubic"}, "interpolation is 'cubic' (did you mean 'bicubic'"),
        ({"size": 8, "std": [0, 1, 1]}, "expected numbers above 0"),
    ],
)
def test_preprocessing_that_cannot_be(given: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_preprocessing(given, "preprocessing")
    assert message in str(caught.value) and "\n" not in str(caught.value)
