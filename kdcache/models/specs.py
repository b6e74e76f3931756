"""What a model SPEC means. A new one is a function and an entry in MODELS."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.data.code_specs import call, has_parameter, no_foreign_code, resolve_spec
from kdcache.data.preprocessing import FILES as PREPROCESSING
from kdcache.data.preprocessing import (
    Preprocessing,
    has_preprocessing,
    of_folder,
    of_timm,
    of_torchvision,
    read_preprocessing,
)
from kdcache.data.views import seeded_generators
from kdcache.errors import KDCacheError, UsageError, did_you_mean
from kdcache.models.runs import OPTIONS, RECORDED, is_run, read_options
from kdcache.user.code_errors import attribute, describe, reraise_interrupt
from kdcache.user.paths import local_path

# Task -> the transformers classes that build it, the first that knows the kind of config. Where an
# architecture serves two tasks, as BART's does, it is for the one that comes first.
TASKS: dict[str, tuple[str, ...]] = {
    # Models of text and images predict the next token of text alone too.
    "causal-lm": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "sequence-classification": ("AutoModelForSequenceClassification",),
    "image-classification": ("AutoModelForImageClassification",),
    "token-classification": ("AutoModelForTokenClassification",),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM",),
    "masked-lm": ("AutoModelForMaskedLM",),
}
# V is the vocabulary's; the others have num_labels
LANGUAGE_TASKS = ("causal-lm", "seq2seq-lm", "masked-lm")
# What a folder may hold beside the model that turns its inputs into ids and pixels.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
)

OWN_CODE = "give it as file.py:name, a function of yours that makes it"
# how what was loaded begins to say that nothing was
RANDOM = "random weights"
POSITION_TABLES = (
    "wpe",
    "position_embeddings",
    "embed_positions",
    "pos_embed",
    "position_embedding",
)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What the caller asks of a model, whatever its SPEC."""

    seed: int = 0
    dtype: torch.dtype | None = None
    num_classes: int | None = None

    @property
    def classes(self) -> dict[str, int]:
        """`num_classes` as an argument, where it is known."""
        return {} if self.num_classes is None else {"num_classes": self.num_classes}

    def seeded(self) -> AbstractContextManager[None]:
        """A block in which modules are made: seeded here and not earlier, because an import may
        draw numbers too.
        """
        return seeded_generators(self.seed, self.seed, self.seed)

    @property
    def random(self) -> str:
        """How the origin of random weights is said."""
        return f"{RANDOM}, seed {self.seed}"


@dataclass(slots=True)
class Built:
    """What a SPEC gave: a module, where its weights are from, its width and task if known, how its
    files are saved, the local folder that it or its small files are in, if any, the names of its
    classes where the module does not carry them, and how it wants pictures prepared if its library
    says so."""

    module: nn.Module
    loaded: str
    num_classes: int | None
    task: str = ""
    save: Callable[[Path], None] | None = None
    folder: Path | None = None
    class_names: tuple[str, ...] = ()
    prepared: Preprocessing | None = None


def build(spec: str, wanted: BuildOptions, args: Mapping[str, Any]) -> Built:
    """The module that `spec` names, made with `args`; UsageError for what is unknown of them."""
    prefix, _, rest = spec.partition(":")
    if prefix in MODELS:
        if not rest:
            raise UsageError(f"model {spec}: expected {prefix}:{MODELS[prefix][0]}")
        built: Built = call(partial(MODELS[prefix][1], rest, wanted), args, where=f"model {spec}")
        return built
    # what a file makes as it runs is then the same in every process
    with seeded_generators(0, 0, 0):
        found = resolve_spec(spec, MODELS, known_specs(), "model")
    return _from_code(spec, found, wanted, dict(args))


def known_specs() -> list[str]:
    """How every model SPEC is written."""
    return [
        *(f"{prefix}:{rest}" for prefix, (rest, _) in MODELS.items()),
        "file.py:name",
        "package.module:name",
    ]


def first_few(names: Iterable[str], count: int = 4) -> str:
    """The first few names, and dots if there are more."""
    every = list(names)
    return ", ".join(every[:count]) + (", ..." if len(every) > count else "")


def _from_code(spec: str, found: Any, wanted: BuildOptions, args: dict[str, Any]) -> Built:
    loaded = f"{wanted.random}, by {spec}"
    if isinstance(found, nn.Module):
        if args:
            raise UsageError(
                f"model {spec} is a {type(found).__name__}, not a function; it takes no arguments"
            )
        loaded = f"the module {spec} as it is"
    elif callable(found):
        if has_parameter(found, "num_classes"):
            args = {**wanted.classes, **args}
        with wanted.seeded():
            found = call(found, args, where=f"model {spec}")
    if not isinstance(found, nn.Module):
        raise UsageError(f"model {spec} gave a {type(found).__name__}; expected a torch.nn.Module")
    return Built(found, loaded, _classes_of(found, args))


def _timm(name: str, wanted: BuildOptions, /, *, pretrained: bool = False, **args: Any) -> Built:
    timm = _import("timm", "kdcache[vision]")
    # with a colon it names a hub, as in hf-hub:timm/...
    if ":" not in name and not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    with wanted.seeded():
        module = timm.create_model(name, pretrained=pretrained, **{**wanted.classes, **args})
    prepared = None
    if pretrained:
        prepared = of_timm(
            _import("timm.data", "kdcache[vision]").resolve_model_data_config(module)
        )
    return Built(
        module,
        f"pretrained weights of timm's {name}" if pretrained else wanted.random,
        _classes_of(module, args),
        prepared=prepared,
    )


def _torchvision(
    name: str, wanted: BuildOptions, /, *, pretrained: bool = False, **args: Any
) -> Built:
    models = _import("torchvision.models", "kdcache[vision]")
    if name not in models.list_models():
        raise UsageError(
            f"torchvision has no model {name!r}{did_you_mean(name, models.list_models())}"
        )
    if not pretrained:
        # pretrained weights fix the number of classes themselves
        args = {**wanted.classes, **args}
    with wanted.seeded():
        module = models.get_model(name, weights="DEFAULT" if pretrained else None, **args)
    best = models.get_model_weights(name).DEFAULT if pretrained else None
    names = () if best is None else best.meta.get("categories", ())
    return Built(
        module,
        f"pretrained weights of torchvision's {name}" if pretrained else wanted.random,
        _classes_of(module, args),
        class_names=tuple(names),
        prepared=None if best is None else of_torchvision(best.transforms()),
    )


def _hf(
    path: str,
    wanted: BuildOptions,
    /,
    *,
    task: str | None = None,
    new_head: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    attn_implementation: str | None = None,
) -> Built:
    """A pretrained model; new_head: tensors that the checkpoint lacks, or has in another shape,
    start at random.
    """
    path = _existing(path, "hf")
    where = {"revision": revision or "main", "local_files_only": local_files_only}
    config = _config(path, "hf", where)
    task = _task(config, task, f"hf:{path}")
    resized = task not in LANGUAGE_TASKS and wanted.num_classes not in (None, config.num_labels)
    if resized and not new_head:
        raise UsageError(
            f"hf:{path} has {config.num_labels} classes, wanted are {wanted.num_classes}: give "
            "new_head=true to start its last layer anew"
        )
    loader = _builder(config, task, f"hf:{path}")
    if attn_implementation is not None:
        where["attn_implementation"] = attn_implementation
    with wanted.seeded(), no_progress_bars(), no_foreign_code(f"model hf:{path}", OWN_CODE):
        module, info = loader.from_pretrained(
            path,
            dtype=wanted.dtype or "auto",
            use_safetensors=not _only_pickled(path),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **({"num_labels": wanted.num_classes} if resized else {}),
            **where,
        )
    fresh = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if fresh and not new_head:
        raise UsageError(
            f"hf:{path} holds no fitting weights for {first_few(fresh)} of "
            f"{type(module).__name__}; give new_head=true to start them at random, or another task="
        )
    loaded = f"pretrained {type(module).__name__} from {path}"
    if fresh:
        loaded += f", with {wanted.random}, for {first_few(fresh)}"
    if unused := sorted(info["unexpected_keys"]):
        loaded += f" ({len(unused)} of its tensors unused: {first_few(unused)})"
    return _hf_built(
        module,
        loaded,
        task,
        path,
        wanted,
        _small_files(path, revision=revision or "main", local_files_only=local_files_only),
    )


def _hf_config(
    path: str, wanted: BuildOptions, /, *, task: str | None = None, **overrides: Any
) -> Built:
    """A model with random weights from a config.json, or the folder that holds one; overrides:
    fields of the config.
    """
    path = _existing(path, "hf-config")
    config = _config(path, "hf-config", {})
    foreign = [
        key for key in overrides if not hasattr(config, key) and key != "attn_implementation"
    ]
    if foreign:
        raise UsageError(
            f"hf-config:{path} has no field {foreign[0]!r}{did_you_mean(foreign[0], config.to_dict())}"
        )
    task = _task(config, task, f"hf-config:{path}")
    if task not in LANGUAGE_TASKS and wanted.num_classes is not None:
        overrides.setdefault("num_labels", wanted.num_classes)
    config = _config(path, "hf-config", overrides)
    maker = _builder(config, task, f"hf-config:{path}")
    with wanted.seeded(), no_foreign_code(f"model hf-config:{path}", OWN_CODE):
        # load_model casts it, as it does every other.
        module = maker.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return _hf_built(
        module,
        f"{wanted.random}, for {type(module).__name__} from {path}",
        task,
        path,
        wanted,
        _small_files(path),
    )


def _hf_built(
    module: nn.Module, loaded: str, task: str, path: str, wanted: BuildOptions, folder: Path | None
) -> Built:
    config: Any = module.config
    width = int(
        config.get_text_config().vocab_size if task in LANGUAGE_TASKS else config.num_labels
    )
    if wanted.num_classes is not None and width < wanted.num_classes:
        raise UsageError(
            f"model {path} gives {width} logits; wanted are at least {wanted.num_classes}, the "
            "teacher's classes; where the teacher's last ones are padding that no label and no "
            f"token uses, dump again with --classes {width}"
        )
    return Built(module, loaded, width, task, partial(_save_hf, module, path), folder)


def _small_files(
    path: str, *, revision: str = "main", local_files_only: bool = False
) -> Path | None:
    """The local folder with what a model has beside its weights: `path`, or for a hub id its
    snapshot in the hub's cache, into which tokenizer and preprocessing are fetched; None for a
    config.json alone."""
    if os.path.exists(path):
        return Path(path) if os.path.isdir(path) else None
    from transformers.utils.hub import cached_file

    found = None
    for name in ("config.json", *PREPROCESSING, "tokenizer.json"):
        file = cached_file(
            path,
            name,
            revision=revision,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        found = Path(file).parent if name == "config.json" and file is not None else found
    return found


def recorded_by(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """What the run whose best/ or last/ a folder is recorded of itself, and its run.toml; None if
    it is no run's.
    """
    run = folder.resolve().parent
    try:
        return (read_options(run)[RECORDED], run / OPTIONS) if is_run(run) else None
    except KDCacheError:  # a file of that name that is no run's
        return None


def names_in(recorded: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names that a run recorded; () where it did not."""
    names = recorded.get("class-names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def own_preprocessing(folder: Path) -> Preprocessing | None:
    """How the model in a folder wants pictures prepared; None where nobody says.

    For best/ and last/ of a run as those were that it was trained on, else as the folder's
    preprocessor_config.json says. UsageError for one that asks for what is not done here.
    """
    run = recorded_by(folder)
    text = None if run is None else run[0].get("preprocessing")
    # nothing else: no path of a stranger's
    if run is not None and isinstance(text, str) and text.startswith("{"):
        return read_preprocessing(text, f"{run[1]}: preprocessing")
    return of_folder(folder) if has_preprocessing(folder) else None


def spec_folder(spec: object) -> Path | None:
    """The local folder with the small files of the model that a SPEC of Hugging Face names; None
    for other SPECs.
    """
    prefix, _, rest = str(spec).partition(":")
    if prefix not in ("hf", "hf-config") or not rest or not isinstance(spec, str):
        return None
    path = _existing(rest, prefix)
    return Path(path).parent if Path(path).is_file() else _small_files(path)


def own_tokenizer(folder: Path) -> tuple[str, Path] | None:
    """The fingerprint (data/text.py) of the tokenizer that the model in a folder is for, and the
    file that says so.

    For best/ and last/ of a run that is what run.toml recorded: what it was trained on, whatever
    tokenizer came along. Else it is the folder's tokenizer.json; None without either.
    """
    file, run = folder / "tokenizer.json", recorded_by(folder)
    if run is not None and isinstance(run[0].get("tokenizer"), str):
        return run[0]["tokenizer"], run[1]
    if not file.is_file():
        return None
    from kdcache.data.text import fingerprint, load_tokenizer

    return fingerprint(load_tokenizer(str(file))), file


def position_limit(module: nn.Module) -> tuple[int, bool] | None:
    """max_position_embeddings of a Hugging Face config, and whether a learned table of that length
    sets it: beyond it such a model cannot run; rotary ones can, on angles that they were not
    trained on. None where no config says."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if type(limit) is not int or limit < 1:
        return None
    # OPT and RoBERTa keep two rows more, for padding.
    learned = any(
        isinstance(part, nn.Embedding)
        and limit <= part.num_embeddings <= limit + 2
        and name.rpartition(".")[2] in POSITION_TABLES
        for name, part in module.named_modules()
    )
    return limit, learned


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every checkpoint and every load: standard error is for our own
    progress.
    """
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging as module

    logging: Any = module

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _save_hf(module: Any, source: str, folder: Path) -> None:
    """Model and config by `save_pretrained`, and the tokenizer's files as they came."""
    with no_progress_bars():
        module.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        file = Path(source) / name
        if not Path(source).exists():  # a hub id: its files lie in the hub's own cache
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(source, name)
            if not isinstance(found, str):
                continue
            file = Path(found)
        if file.is_file() and file.resolve() != (folder / name).resolve():
            shutil.copyfile(file, folder / name)


def _existing(path: str, prefix: str) -> str:
    """`path` with its ~ spelt out; UsageError if it has the form of a local path and nothing is
    there.
    """
    local = local_path(path, f"model {prefix}")
    if not os.path.exists(local) and (path.startswith(("/", "~", ".")) or path.count("/") > 1):
        raise UsageError(f"model {prefix}:{path}: no such file or folder")
    return str(local) if os.path.exists(local) else path


def _config(path: str, prefix: str, overrides: Mapping[str, Any]) -> Any:
    transformers = _import("transformers", "kdcache[hf]")
    if os.path.isdir(path) and not (Path(path) / "config.json").is_file():
        raise UsageError(
            f"model {prefix}:{path}: the folder has no config.json{_adapter(Path(path))}"
        )
    try:
        with no_foreign_code(f"model {prefix}:{path}", OWN_CODE):
            return transformers.AutoConfig.from_pretrained(
                path, trust_remote_code=False, **overrides
            )
    except KDCacheError:
        raise
    # OSError, ValueError, and for damaged files what the reading library raises
    except Exception as e:
        reraise_interrupt(e)
        raise UsageError(
            f"model {prefix}:{path} has no config that transformers can read: {describe(e)}"
        ) from e


def _adapter(folder: Path) -> str:
    """What to do with a folder that holds an adapter of peft and no model."""
    if not (folder / "adapter_config.json").is_file():
        return "; expected a folder of save_pretrained"
    return (
        "; it holds an adapter of peft: merge it into its model first, "
        "PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(OTHER)"
    )


def _task(config: Any, asked: str | None, where: str) -> str:
    """The task asked for, else the one that the config's architecture is for.

    UsageError for an unknown task, and where no task is for the architecture: it names those that
    this kind of model can be built for, none of which need be what its weights were trained for.
    """
    if asked is not None:
        if asked not in TASKS:
            raise UsageError(f"{where}: task is {asked!r}{did_you_mean(str(asked), TASKS)}")
        return asked
    architectures, kinds = config.architectures or [], _kinds(config)
    for task, names in kinds.items():
        if any(name in names for name in architectures):
            return task
    found = " and ".join(architectures) or "of no stated architecture"
    if not kinds:
        raise UsageError(
            f"{where} is {found}, which is for none of the tasks {', '.join(TASKS)}; give a module "
            "by file.py:name that returns the logits"
        )
    raise UsageError(
        f"{where} is {found}, a head (if any) for another task; give "
        f"task={' or task='.join(kinds)}, if its weights were trained for that"
    )


def _builder(config: Any, task: str, where: str) -> Any:
    """The class of transformers that builds models of this kind of config for a task; UsageError if
    none does.
    """
    transformers = _import("transformers", "kdcache[hf]")
    for auto in TASKS[task]:
        # A class that comes with the folder is in no table: it is refused, as code of a stranger's,
        # when it is built.
        if type(config) in getattr(transformers, auto)._model_mapping or getattr(
            config, "auto_map", None
        ):
            return getattr(transformers, auto)
    raise UsageError(
        f"{where} has a {type(config).__name__}, of which transformers makes no model for {task}"
        + (f"; give task={' or task='.join(kinds)}" if (kinds := _kinds(config)) else "")
    )


def _only_pickled(path: str) -> bool:
    """Whether a folder has pytorch_model.bin (or parts of it) and no safetensors; of these
    transformers reads tensors alone too, by torch's safe unpickler."""
    folder = Path(path)
    return any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors"))


def _kinds(config: Any) -> dict[str, set[str]]:
    """Task -> the names of the classes that transformers has for it and this kind of config."""
    transformers, out = _import("transformers", "kdcache[hf]"), dict[str, set[str]]()
    for task, autos in TASKS.items():
        for auto in autos:
            mapping = getattr(transformers, auto)._model_mapping
            if type(config) in mapping:
                classes = mapping[type(config)]
                kinds = classes if isinstance(classes, tuple | list) else (classes,)
                out.setdefault(task, set()).update(kind.__name__ for kind in kinds)
    return out


def _import(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    # a torchvision built for another torch fails with RuntimeError, not ImportError
    except Exception as e:
        reraise_interrupt(e)
        if (
            isinstance(e, ModuleNotFoundError)
            and (e.name or "").partition(".")[0] == name.partition(".")[0]
        ):
            advice = f"pip install '{extra}'"
        else:
            advice = (
                f"it is installed, and does not go with torch {torch.__version__} or with another "
                "package here; install builds of both that belong together"
            )
        raise UsageError(f"{name} cannot be imported ({describe(e)}): {advice}") from e


def _classes_of(module: nn.Module, args: Mapping[str, Any]) -> int | None:
    """The module's attribute `num_classes`, else what it was asked for."""
    own = attribute(
        module, "num_classes", f"model {type(module).__name__}", args.get("num_classes")
    )
    return own if type(own) is int and own > 0 else None


# SPEC prefix -> what stands after its colon, and the function that gets that, what is wanted, and
# the arguments.
MODELS: dict[str, tuple[str, Callable[..., Built]]] = {
    "hf": ("PATH_OR_ID", _hf),
    "hf-config": ("PATH", _hf_config),
    "timm": ("NAME", _timm),
    "torchvision": ("NAME", _torchvision),
}
