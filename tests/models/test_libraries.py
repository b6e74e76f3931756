"""Models of transformers, timm and torchvision, as far as they import here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from student_world import equal_weights
from torch import nn

from kdcache.errors import UsageError
from kdcache.models.model import forward, load_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of tiny random Hugging Face models, by kind."""
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text, pixels = (
        {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0},
        {"image_size": 8, "patch_size": 4},
    )
    configs = {
        "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**text, **small)),
        "gpt2": (
            "GPT2LMHeadModel",
            transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **text),
        ),
        "bert": (
            "BertForSequenceClassification",
            transformers.BertConfig(num_labels=3, vocab_size=32, **small),
        ),
        "vit": (
            "ViTForImageClassification",
            transformers.ViTConfig(num_labels=5, **pixels, **small),
        ),
        "deit": (
            "DeiTForImageClassificationWithTeacher",
            transformers.DeiTConfig(num_labels=5, **pixels, **small),
        ),
        "tagger": (
            "BertForTokenClassification",
            transformers.BertConfig(num_labels=3, vocab_size=32, **small),
        ),
        "mlm": ("BertForMaskedLM", transformers.BertConfig(vocab_size=32, **small)),
        "bart": (
            "BartForConditionalGeneration",
            transformers.BartConfig(
                d_model=8,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                pad_token_id=1,
                decoder_start_token_id=0,
                forced_eos_token_id=0,
                max_position_embeddings=16,
                **text,
            ),
        ),
        "mistral3": (
            "Mistral3ForConditionalGeneration",
            transformers.Mistral3Config(
                text_config={
                    "model_type": "mistral",
                    "num_key_value_heads": 1,
                    "head_dim": 4,
                    **text,
                    **small,
                },
                vision_config={"model_type": "pixtral", "head_dim": 4, **pixels, **small},
            ),
        ),
    }
    root = tmp_path_factory.mktemp("hf")
    for name, (kind, config) in configs.items():
        torch.manual_seed(0)
        getattr(transformers, kind)(config).save_pretrained(root / name)
    (root / "llama" / "tokenizer.json").write_text('{"a": 1}')
    return root


INPUTS = {
    "llama": ({"input_ids": torch.arange(6).reshape(2, 3)}, (2, 3, 32), "causal-lm"),
    "gpt2": ({"input_ids": torch.arange(6).reshape(2, 3)}, (2, 3, 32), "causal-lm"),
    "bert": ({"input_ids": torch.arange(6).reshape(2, 3)}, (2, 3), "sequence-classification"),
    "vit": (torch.arange(384.0).reshape(2, 3, 8, 8) / 384, (2, 5), "image-classification"),
    "deit": (torch.arange(384.0).reshape(2, 3, 8, 8) / 384, (2, 5), "image-classification"),
    "tagger": ({"input_ids": torch.arange(6).reshape(2, 3)}, (2, 3, 3), "token-classification"),
    "mlm": ({"input_ids": torch.arange(6).reshape(2, 3)}, (2, 3, 32), "masked-lm"),
    "mistral3": ({"input_ids": torch.arange(6).reshape(2, 3)}, (2, 3, 32), "causal-lm"),
    "bart": ({"input_ids": torch.arange(6).reshape(2, 3)}, (2, 3, 32), "seq2seq-lm"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_hugging_face_models(tiny, tmp_path, name):
    import transformers

    inputs, shape, task = INPUTS[name]
    model = load_model(f"hf:{tiny}/{name}")
    model.module.eval()
    assert (model.task, model.num_classes, model.dtype) == (task, shape[-1], "float32")
    assert model.loaded == f"pretrained {type(model.module).__name__} from {tiny}/{name}"
    logits = forward(model.module, inputs).logits
    assert logits.shape == shape
    plain = getattr(transformers, type(model.module).__name__).from_pretrained(tiny / name).eval()
    assert torch.equal(
        logits, (plain(**inputs) if isinstance(inputs, dict) else plain(inputs)).logits
    )

    with torch.no_grad():
        next(model.module.parameters()).add_(1)
    model.save(tmp_path / "out")
    opened = type(model.module).from_pretrained(tmp_path / "out").eval()
    assert equal_weights(opened, model.module) and (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists() == (name == "llama")
    again = load_model(f"hf:{tiny}/{name}", weights=tmp_path / "out")
    assert equal_weights(again.module, model.module)
    state = load_file(tmp_path / "out" / "model.safetensors")
    gone = sorted(state)[-1]
    save_file(
        {other: value for other, value in state.items() if other != gone},
        tmp_path / "less.safetensors",
    )
    with pytest.raises(UsageError, match=r"does not fit .*: [124] missing: "):
        load_model(f"hf:{tiny}/{name}", weights=tmp_path / "less.safetensors")

    fresh, same = (
        load_model(f"hf-config:{tiny}/{name}", seed=1),
        load_model(f"hf-config:{tiny}/{name}", seed=1),
    )
    assert equal_weights(fresh.module, same.module) and not equal_weights(fresh.module, plain)
    assert fresh.loaded == f"random weights, seed 1, for {type(plain).__name__} from {tiny}/{name}"
    assert fresh.num_classes == shape[-1] and fresh.task == task


def test_a_folder_with_pytorch_model_bin_alone_is_read_and_not_run(tiny, tmp_path):
    whole = load_model(f"hf:{tiny}/bert").module
    shutil.copytree(tiny / "bert", tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(whole.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert equal_weights(load_model(f"hf:{tmp_path}/bin").module, whole)

    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save(
        {**whole.state_dict(), "classifier.bias": Trap()}, tmp_path / "bin" / "pytorch_model.bin"
    )
    with pytest.raises(UsageError, match="UnpicklingError"):
        load_model(f"hf:{tmp_path}/bin")
    assert not (tmp_path / "ran").exists()


def test_no_keys_and_values_are_kept_in_a_forward(tiny):
    module = load_model(f"hf:{tiny}/llama").module
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output.past_key_values))
    forward(module, INPUTS["llama"][0])
    assert seen == [None] and module.config.use_cache


def test_hugging_face_options(tiny, tmp_path):
    assert load_model(f"hf:{tiny}/llama", dtype="bfloat16").dtype == "bfloat16"
    changed = load_model(f"hf-config:{tiny}/llama/config.json", args={"num_hidden_layers": 2})
    assert len(changed.module.model.layers) == 2
    assert load_model(f"hf-config:{tiny}/bert", num_classes=7).num_classes == 7
    # padded vocabularies are sliced
    assert load_model(f"hf:{tiny}/llama", num_classes=30).num_classes == 32
    resized = load_model(f"hf:{tiny}/vit", num_classes=9, args={"new_head": True}, seed=1)
    assert resized.num_classes == 9
    assert resized.loaded.endswith(
        ", with random weights, seed 1, for classifier.bias, classifier.weight"
    )
    same = load_model(f"hf:{tiny}/vit", num_classes=9, args={"new_head": True}, seed=1)
    assert equal_weights(resized.module, same.module)
    config = json.loads((tiny / "bert" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    assert (
        load_model(f"hf-config:{tmp_path}", args={"task": "sequence-classification"}).num_classes
        == 3
    )
    for kind, name in (("t5", "T5EncoderModel"), ("encodec", "EncodecModel")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(
            json.dumps({"model_type": kind, "architectures": [name]})
        )
    for name in ("broken", "adapter", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "broken" / "config.json").write_text("{")
    for spec, args, message in [
        (
            f"hf-config:{tmp_path}",
            {},
            "is BertModel, .* give task=causal-lm or .* or task=masked-lm, if",
        ),
        (
            f"hf-config:{tmp_path}/t5",
            {},
            "is T5EncoderModel, .* give task=sequence-classification or ",
        ),
        (
            f"hf-config:{tmp_path}/encodec",
            {},
            "is EncodecModel, which is for none of the tasks .* file.py:name",
        ),
        (
            f"hf:{tiny}/llama",
            {"task": "sequence-classification"},
            "no fitting weights for score.weight of LlamaForSeq",
        ),
        (
            f"hf:{tiny}/vit",
            {"task": "causal-lm"},
            "has a ViTConfig, .* no model for causal-lm; give task=im",
        ),
        (
            f"hf:{tmp_path}/adapter",
            {},
            r"has no config.json; it holds an adapter of peft: merge it",
        ),
        (
            f"hf-config:{tmp_path}/empty",
            {},
            r"has no config.json; expected a folder of save_pretrained",
        ),
        (f"hf:{tiny}/llama", {"task": "causal"}, r"task is 'causal' \(did you mean 'causal-lm'"),
        (f"hf:{tiny}/llama", {"tsk": "causal-lm"}, "takes no argument 'tsk'"),
        (
            f"hf-config:{tiny}/llama",
            {"hiden_size": 8},
            r"has no field 'hiden_size' \(did you mean 'hidden_size'",
        ),
        (f"hf:{tiny}/none", {}, "no such file or folder"),
        (f"hf:{tmp_path}/broken", {}, "has no config that transformers can read"),
        (f"hf:{tmp_path}", {"task": "causal-lm"}, "OSError"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_model(spec, args=args)
    with pytest.raises(UsageError, match=r"has 5 classes, wanted are 9: give new_head=true"):
        load_model(f"hf:{tiny}/vit", num_classes=9)
    with pytest.raises(UsageError, match="gives 32 logits; wanted are at least 40"):
        load_model(f"hf:{tiny}/llama", num_classes=40)


@pytest.mark.parametrize(
    ("library", "spec"), [("timm", "timm:resnet18"), ("torchvision", "torchvision:resnet18")]
)
def test_a_library_that_does_not_import_is_said_in_one_line(monkeypatch, library, spec):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.models", None)
    with pytest.raises(
        UsageError,
        match=rf"{library}.* cannot be imported \(ModuleNotFoundError.*\): "
        r"pip install 'kdcache\[vision\]'",
    ):
        load_model(spec)


@pytest.mark.parametrize(
    "error", ["RuntimeError('operator nms does not exist')", "ImportError('no symbol')"]
)
def test_a_library_that_is_there_and_broken_needs_no_installing(monkeypatch, tmp_path, error):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(f"raise {error}")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UsageError, match=r"timm cannot be imported .*it is installed, and does not go with torch"
    ) as e:
        load_model("timm:resnet18")
    assert "pip install" not in str(e.value)


def test_timm_and_torchvision_are_asked_for_what_is_wanted(monkeypatch):
    asked = []

    def create(name, **args):
        asked.append((name, args))
        return nn.Linear(2, args.get("num_classes", 1000))

    timm = ModuleType("timm")
    timm.create_model, timm.is_model, timm.list_models = (
        create,
        lambda name: name == "resnet18",
        lambda: ["resnet18"],
    )
    vision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    vision.models, models.get_model, models.list_models = models, create, lambda: ["resnet18"]
    numbers = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    transforms = SimpleNamespace(
        crop_size=[224],
        resize_size=[256],
        **numbers,
        interpolation=SimpleNamespace(value="bilinear"),
    )
    meta = SimpleNamespace(
        meta={"categories": [f"class {i}" for i in range(1000)]}, transforms=lambda: transforms
    )
    timm_data = ModuleType("timm.data")
    timm_data.resolve_model_data_config = lambda module: {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        **numbers,
    }
    monkeypatch.setitem(sys.modules, "timm.data", timm_data)
    models.get_model_weights = lambda name: SimpleNamespace(DEFAULT=meta)
    for name, module in (("timm", timm), ("torchvision", vision), ("torchvision.models", models)):
        monkeypatch.setitem(sys.modules, name, module)

    dropping = load_model("timm:resnet18", num_classes=7, args={"drop_rate": 0.1}, seed=2)
    assert dropping.loaded == "random weights, seed 2"
    known = load_model("timm:resnet18", args={"pretrained": True})
    assert known.loaded == "pretrained weights of timm's resnet18" and dropping.preprocessing == ""
    assert load_model("torchvision:resnet18", num_classes=7).num_classes == 7
    pretrained = load_model("torchvision:resnet18", num_classes=7, args={"pretrained": True})
    assert (
        pretrained.preprocessing == known.preprocessing != ""
        and '"resize":256' in known.preprocessing
    )
    assert pretrained.num_classes is None and pretrained.class_names == meta.meta["categories"]
    assert asked == [
        ("resnet18", {"pretrained": False, "num_classes": 7, "drop_rate": 0.1}),
        ("resnet18", {"pretrained": True}),
        ("resnet18", {"weights": None, "num_classes": 7}),
        ("resnet18", {"weights": "DEFAULT"}),
    ]
    for library in ("timm", "torchvision"):
        with pytest.raises(
            UsageError, match=rf"{library} has no model 'resnet81' \(did you mean 'resnet18'"
        ):
            load_model(f"{library}:resnet81")


@pytest.mark.parametrize("what", ["hf", "hf-config", "model alone", "tokenizer", "hub"])
def test_code_that_comes_with_files_is_never_run_nor_asked_about(tiny, tmp_path, monkeypatch, what):
    """transformers would ask on the terminal, and run it after a y."""
    from kdcache.data.text import load_tokenizer

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    auto = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": [None, "evil.T"],
    }
    config = json.loads((tiny / "llama" / "config.json").read_text())
    # the config is one of transformers', the class of the model is not
    if what == "model alone":
        config = {
            **config,
            "model_type": "clip_text_model",
            "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        }
    elif what != "hub":
        config = {**config, "model_type": "evil", "auto_map": auto}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": auto})
    )
    shutil.copyfile(tiny / "llama" / "model.safetensors", folder / "model.safetensors")
    if what == "tokenizer":
        with pytest.raises(
            UsageError, match=rf"tokenizer {folder} brings code of its own .*save it as a token"
        ):
            load_tokenizer(str(folder))
    # a class of transformers' own: the code beside it is not needed
    elif what == "hub":
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
        assert type(load_model(f"hf:{folder}").module).__name__ == "LlamaForCausalLM"
    else:
        spec = f"{'hf-config' if what == 'hf-config' else 'hf'}:{folder}"
        with pytest.raises(
            UsageError, match=rf"model {spec} brings code of its own .*give it as file\.py:name"
        ):
            load_model(spec, args={"task": "causal-lm"})
    assert not (tmp_path / "ran").exists()
