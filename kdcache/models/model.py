"""Model SPECs: a name on the command line -> a module that gives logits; and what both stages do
with a module.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.data.classes import model_names
from kdcache.data.code_specs import accepts
from kdcache.data.padding import Inputs
from kdcache.data.preprocessing import Preprocessing
from kdcache.data.transfer import to_device
from kdcache.errors import DataError, UsageError, did_you_mean
from kdcache.models.fingerprint import architecture, weights_digest
from kdcache.models.specs import (
    BuildOptions,
    build,
    names_in,
    no_progress_bars,
    own_preprocessing,
    own_tokenizer,
    recorded_by,
)
from kdcache.models.weights import load_weights, plain_state, weights_dtype
from kdcache.user.code_errors import attribute, message, printable, reraise_interrupt, users_code
from kdcache.user.paths import local_path

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass
class Model:
    """A module and where it came from.

    spec: the SPEC. loaded: a sentence saying what was loaded from where. num_classes: width of its
    logits, None if unknown before a forward pass. task: one of model_specs.TASKS for hf: and
    hf-config:, else "". folder: the local one it is from, for these. named: its classes, and
    prepared: how it wants pictures, where the library says so. Training or eval mode, and the
    device, are the caller's to set.
    """

    module: nn.Module
    spec: str
    loaded: str
    num_classes: int | None
    task: str
    save_files: Callable[[Path], None] | None
    folder: Path | None = None
    named: tuple[str, ...] = ()
    prepared: Preprocessing | None = None

    @cached_property
    def preprocessing(self) -> str:
        """How it wants pictures prepared, as data/preprocessing.py writes it; "" where nobody says.
        UsageError where its folder asks for what is not done here."""
        if (
            self.prepared is None
            and self.home is not None
            and self.task in ("", "image-classification")
        ):
            self.prepared = own_preprocessing(self.home)
        return "" if self.prepared is None else self.prepared.to_text()

    @property
    def known_preprocessing(self) -> str:
        """The same, and "" too for what is not done here: where nothing is to be prepared by it."""
        try:
            return self.preprocessing
        except UsageError:
            return ""

    @property
    def class_names(self) -> list[str]:
        """The names of its classes, by number, as far as the module, its library or the run that it
        is from know them; [] where they do not, or know others than there are logits for."""
        names = list(self.named) or model_names(self.module)
        return names if self.num_classes in (None, len(names)) else []

    @property
    def home(self) -> Path | None:
        """The local folder that it is from: `folder`, or that of a Hugging Face model which was
        given as an object.
        """
        named = getattr(self.module, "name_or_path", None)
        if self.folder is not None or not isinstance(named, str) or not named:
            return self.folder
        return Path(named) if Path(named).is_dir() else None

    @cached_property
    def tokenizer(self) -> tuple[str, Path] | None:
        """The fingerprint of the tokenizer that it is for, and the file that says so; None where
        nobody says, or where that cannot be read."""
        if self.home is None or self.task == "image-classification":
            return None
        try:
            return own_tokenizer(self.home)
        except UsageError:
            return None

    @property
    def dtype(self) -> str:
        """The dtype of the weights, such as "float32"."""
        return str(weights_dtype(self.module) or torch.get_default_dtype()).removeprefix("torch.")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The `teacher` part of an identity; the digest is of the weights as they are when this is
        first read.
        """
        adapters = attribute(self.module, "peft_config", f"model {type(self.module).__name__}")
        return {
            "weights": weights_digest(self.module),
            "dtype": self.dtype,
            "preprocessing": self.known_preprocessing,
            "adapters": ",".join(
                sorted(map(str, adapters if isinstance(adapters, Mapping) else ()))
            ),
            "num_classes": self.num_classes or 0,
            **architecture(self.module),
            **({"class_names": names} if (names := self.class_names) else {}),
            **({"tokenizer": self.tokenizer[0]} if self.tokenizer is not None else {}),
        }

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors into `folder`; for Hugging Face models what `from_pretrained`
        opens, and the tokenizer if the model came with one."""
        path = local_path(folder, "folder")
        path.mkdir(parents=True, exist_ok=True)
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        with users_code(
            f"the weights of {type(self.module).__name__} cannot be saved",
            but=(OSError, SafetensorError),
        ):
            if self.save_files is not None:
                with no_progress_bars():
                    self.save_files(path)
            else:
                save_file(plain_state(self.module), str(path / "model.safetensors"))


@dataclass(frozen=True, slots=True)
class OwnLoss:
    """`weight` times `value`, a scalar with its graph, is what the model adds; None where nobody
    says its weight.
    """

    value: torch.Tensor
    weight: float | None


@dataclass(frozen=True, slots=True)
class Output:
    """logits: (B, V) or (B, L, V), floating point. row_mask: bool (B, L) or None. own_loss: that
    the model adds to its own when it trains."""

    logits: torch.Tensor
    row_mask: torch.Tensor | None
    own_loss: OwnLoss | None = None


def load_model(
    spec: str,
    *,
    args: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    num_classes: int | None = None,
) -> Model:
    """The model that `spec` names, made with `args` (the parsed --teacher-arg's or
    --student-arg's).

    weights: a file of weights_files.ENDINGS (or a folder with one) to load into it. seed: of random
    weights; the caller's generators are left as they were. dtype: of the weights; None keeps them
    as stored, float32 for random ones. num_classes: for what is made anew, where the SPEC takes it.
    UsageError for what cannot be used.
    """
    wanted = BuildOptions(seed, _dtype(dtype), num_classes)
    built = build(spec, wanted, args or {})
    if weights is not None:
        built.loaded = load_weights(built.module, weights)
    if wanted.dtype is not None:
        built.module.to(wanted.dtype)
    named, prepared = built.class_names, built.prepared
    if weights is not None:  # of a run: what it was trained on
        path = local_path(weights, "weights")
        folder = path if path.is_dir() else path.parent
        run = recorded_by(folder)
        named = names_in(run[0]) if run is not None else named
        prepared = own_preprocessing(folder) if run is not None else None
    return Model(
        built.module,
        spec,
        built.loaded,
        built.num_classes,
        built.task,
        built.save,
        built.folder,
        named,
        prepared,
    )


def as_model(
    given: Any,
    *,
    role: str,
    args: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    dtype: str | None = None,
    num_classes: int | None = None,
) -> Model:
    """The model of a SPEC, around a module, or a `Model` as it is; `role` is what errors call it.

    dtype: to cast the weights to, of a copy where a module was given. The rest is about a SPEC: see
    `load_model`. UsageError for what is none of these, and for arguments or weights without a SPEC.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown{did_you_mean(dtype, DTYPES)}")
    if isinstance(given, str | Path):
        return load_model(
            str(given), args=args, weights=weights, seed=seed, dtype=dtype, num_classes=num_classes
        )
    if args or weights is not None:
        raise UsageError(
            f"{role} arguments or weights are given, but the {role} is an object; they belong to a "
            "SPEC"
        )
    if isinstance(given, Model):
        return dataclasses.replace(given, module=_cast(given.module, dtype, role))
    if not isinstance(given, nn.Module):
        raise UsageError(
            f"the {role} is a {type(given).__name__}; expected a model SPEC or a torch.nn.Module"
        )
    name = type(given).__name__
    classes = attribute(given, "num_classes", f"the {role} ({name})")
    # of Hugging Face models: a folder that from_pretrained opens
    save = attribute(given, "save_pretrained", f"the {role} ({name})")
    return Model(
        _cast(given, dtype, role),
        name,
        f"{name} as given",
        classes if type(classes) is int else None,
        "",
        save,
    )


def _cast(module: nn.Module, dtype: str | None, role: str) -> nn.Module:
    """`module`, or where its weights have another dtype, a copy of it in that one."""
    if dtype is None or all(
        p.dtype == DTYPES[dtype] for p in module.parameters() if p.is_floating_point()
    ):
        return module
    with users_code(f"the {role} ({type(module).__name__}) cannot be copied and cast to {dtype}"):
        return copy.deepcopy(module).to(DTYPES[dtype])


def pick_device(device: str | torch.device | None = None, local_rank: int = 0) -> torch.device:
    """The device asked for; None and "auto" are this rank's GPU if there is one, else the CPU.

    UsageError for a device that cannot be used here.
    """
    if device is None or (isinstance(device, str) and device == "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device):
        raise UsageError(
            f'device is a {type(device).__name__}; expected text such as "cpu" or "cuda:1"'
        )
    try:
        found = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=found)
    # torch built without CUDA asserts; other backends import a module that is not there
    except Exception as e:
        reraise_interrupt(e)
        raise UsageError(
            f"--device {printable(str(device))[:40]} cannot be used here ({message(e)[:120]})"
        ) from e
    return found


def move(module: nn.Module, device: torch.device, role: str) -> None:
    """Move `module`, which has that role, to the device that it is to run on.

    UsageError for one that is dispatched over several devices or whose weights are not in memory:
    moving it would tear it out of the hooks that run it.
    """
    where = f"the {role} ({type(module).__name__})"
    with users_code(f"{where}: its parameters cannot be read"):
        meta = next(
            (
                name
                for name, tensor in (*module.named_parameters(), *module.named_buffers())
                if tensor.is_meta
            ),
            None,
        )
    mapped = attribute(module, "hf_device_map", where)
    devices = (
        sorted({str(found) for found in mapped.values()}) if isinstance(mapped, Mapping) else []
    )
    if meta is not None or len(devices) > 1:
        found = f"has {meta!r} on the device meta, not in memory"
        if devices:
            found = f"lies on the devices {', '.join(devices)}"
        raise UsageError(
            f"{where} {found}; kdcache runs a model whole on one device: load it without "
            f"device_map and offloading, or with device_map={{'': {str(device)!r}}}"
        )
    with users_code(f"{where} cannot be moved to {device}"):
        module.to(device)


def forward(module: nn.Module, inputs: Inputs) -> Output:
    """`module(x)` or `module(**named)` -> its logits. Floating inputs are given in the dtype of the
    weights.

    DataError unless the module returns a tensor, or an object or dict with `logits`, of shape (B,
    V) or (B, L, V).
    """
    name = type(module).__name__
    dtype = weights_dtype(module)
    if isinstance(inputs, dict):
        named = {key: _as_weights(value, dtype) for key, value in inputs.items()}
        for needed in ("attention_mask", "decoder_attention_mask"):
            if needed in named and not _takes(module, needed):
                raise DataError(
                    "the sequences of a batch differ in length and were padded, but "
                    f"{name}.forward takes no {needed}; let it take one (a causal model may ignore "
                    "it), or give equal lengths"
                )
        records = len(next(iter(named.values())))
        if _keeps_a_cache(module):
            # else it returns the keys and values of every layer
            answer = module(**named, use_cache=False)
        else:
            answer = module(**named)
    else:
        records = len(inputs)
        answer = module(_as_weights(inputs, dtype))
    mask = None
    if isinstance(answer, Mapping):
        logits, mask = answer.get("logits"), answer.get("row_mask")
    elif isinstance(answer, torch.Tensor):
        logits = answer
    else:
        logits, mask = getattr(answer, "logits", None), getattr(answer, "row_mask", None)
    if not isinstance(logits, torch.Tensor):
        raise DataError(
            f"{name} returned a {type(answer).__name__}; expected a tensor, or logits in an object "
            "or dict"
        )
    if logits.ndim not in (2, 3) or len(logits) != records or not logits.is_floating_point():
        raise DataError(
            f"{name} returned logits {logits.dtype} {tuple(logits.shape)} for {records} records; "
            "expected floating point (records, classes) or (records, positions, classes)"
        )
    if logits.layout != torch.strided or logits.is_meta or logits.dtype not in DTYPES.values():
        raise DataError(
            f"{name} returned logits {logits.dtype} on {logits.device} ({logits.layout}); expected "
            f"a dense tensor of {', '.join(DTYPES)}"
        )
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise DataError(
            f"{name} returned a row_mask that is a {type(mask).__name__}; expected a tensor"
        )
    if mask is not None and (logits.ndim != 3 or mask.shape != logits.shape[:2]):
        raise DataError(
            f"{name} returned row_mask {tuple(mask.shape)} with logits {tuple(logits.shape)}; "
            "expected (records, positions) of both"
        )
    return Output(logits, None if mask is None else mask != 0, own_loss(module, answer))


@contextmanager
def model_errors(role: str, module: nn.Module, inputs: Inputs, where: str = "") -> Iterator[None]:
    """A forward pass of the user's model, which has that role: DataError in one line for whatever
    it raises.

    where: what the line begins with, such as "step 5: ".
    """
    with users_code(
        lambda: f"{where}the {role} ({type(module).__name__}) cannot be run on {_shapes(inputs)}"
    ):
        yield


def forward_on(
    module: nn.Module,
    inputs: Inputs,
    device: torch.device,
    *,
    role: str,
    where: str = "",
    run: Callable[[nn.Module, Inputs], Output] = forward,
) -> Output:
    """`forward` of inputs that are brought to `device`; what the user's model raises is a DataError
    in one line (see `model_errors`). run: another way to run it, for hidden states in place of logits.
    """
    inputs = to_device(inputs, device)
    with model_errors(role, module, inputs, where):
        return run(module, inputs)


def _shapes(inputs: Inputs) -> str:
    named = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    return ", ".join(
        f"{name} {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
        for name, x in named.items()
    )


def find_module(module: nn.Module, name: str) -> nn.Module:
    """The submodule with that dotted name; UsageError with near names."""
    modules: dict[str, nn.Module] = {
        known: found for known, found in module.named_modules() if known
    }
    if name not in modules:
        raise UsageError(
            f"{type(module).__name__} has no module {name!r}{did_you_mean(name, modules)}"
        )
    return modules[name]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UsageError(f"dtype is {dtype!r}{did_you_mean(dtype, DTYPES)}")
        return DTYPES[dtype]
    return dtype


def _as_weights(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _keeps_a_cache(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "use_cache", False)) and _takes(
        module, "use_cache"
    )


def _takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of `module` has a parameter `name` or takes any keyword."""
    # torch.compile's wrapper has no signature of its own
    inner = getattr(module, "_orig_mod", module)
    return _accepts(type(inner).forward, name)


# a signature costs 20 us, and this is asked at every step
_accepts = lru_cache(maxsize=64)(accepts)


# ---- losses of a model's own
#
# What a model adds to its loss when it trains, beside what its logits say: a router's load
# balancing, known by name. Mixtures of experts of transformers return `aux_loss` beside the logits
# where their config says `output_router_logits`, and add it to the loss of their labels, which
# nothing here gives them, times `router_aux_loss_coef` (JetMoE: `aux_loss_coef`; DBRX:
# `ffn_config.moe_loss_weight`). The same is added here, whatever else is trained on.

# attributes of a module, or of its config
WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
# Losses that models compute inside their own forward, only where it is given labels: they cannot be
# added.
INSIDE = ("router_z_loss_coef", "z_loss_coefficient")


def own_loss(module: Any, answer: Any) -> OwnLoss | None:
    """The `aux_loss` of what a model returned, with its weight; None where there is none, or its
    weight is 0.
    """
    value = (
        answer.get("aux_loss") if isinstance(answer, Mapping) else getattr(answer, "aux_loss", None)
    )
    if (
        not isinstance(value, torch.Tensor)
        or value.numel() != 1
        or (weight := own_weight(module)) == 0
    ):
        return None
    return OwnLoss(value.reshape(()), weight)


def own_weight(module: Any) -> float | None:
    """The weight of a module's `aux_loss`, as it or its config names it."""
    for where in (module, *_configs(module)):
        for name in WEIGHTS:
            found = getattr(where, name, None)
            if isinstance(found, int | float) and not isinstance(found, bool):
                return float(found)
    return None


def left_out(module: Any, given: OwnLoss | None) -> list[str]:
    """A sentence for each loss that a model's config names, or that it returned (`given`), and that
    is not added.
    """
    said = []
    if given is not None and given.weight is None:
        said.append(
            "the aux_loss that it returns is not trained: neither it nor its config has "
            + " or ".join(WEIGHTS)
        )
    for config in _configs(module):
        weight = own_weight(module)
        if given is None and weight:
            off = getattr(config, "output_router_logits", None) is False
            said.append(
                f"the balance loss of its router (router_aux_loss_coef {weight:g}) is not trained: "
                + ("its config has output_router_logits false" if off else "it returns no aux_loss")
            )
        for name in INSIDE:
            if isinstance(found := getattr(config, name, None), int | float) and found > 0:
                said.append(
                    f"the loss of its config's {name} {found:g} is not trained: it is computed "
                    "inside of its forward, from labels"
                )
    return list(dict.fromkeys(said))


def _configs(module: Any) -> list[Any]:
    """The config of a model of transformers, and that of its text part."""
    config = getattr(module, "config", None)
    if config is None:
        return []
    text = (
        config.get_text_config(decoder=True)
        if callable(getattr(config, "get_text_config", None))
        else config
    )
    return [config] if text is config else [config, text]
