"""Model SPECs: a name on the command line -> a module that gives logits; and what both stages do
with a module.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kdcache.data.classes import model_names
from kdcache.data.collate import to_device
from kdcache.data.generators import seeded_generators
from kdcache.data.keys import array_header
from kdcache.data.padding import Inputs
from kdcache.data.preprocessing import Preprocessing
from kdcache.data.user_code import accepts
from kdcache.errors import DataError, FieldDifference, IdentityMismatch, UsageError, near
from kdcache.models.identity import architecture
from kdcache.models.own_losses import OwnLoss, own_loss
from kdcache.models.specs import (
    Wanted,
    build,
    first_few,
    names_in,
    no_progress_bars,
    own_preprocessing,
    own_tokenizer,
    position_limit,
    recorded_by,
)
from kdcache.models.weights import STEPS, read_weights, renamed
from kdcache.user.guard import attribute, let_through, message, printable, users_code
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
    wanted = Wanted(seed, _dtype(dtype), num_classes)
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
        raise UsageError(f"--dtype {dtype!r} is unknown{near(dtype, DTYPES)}")
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
        let_through(e)
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
            "device_map and "
            f"offloading, or with device_map={{'': {str(device)!r}}}"
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
                    f"{name}.forward takes "
                    f"no {needed}; let it take one (a causal model may ignore it), or give equal "
                    "lengths"
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
            "a dense "
            f"tensor of {', '.join(DTYPES)}"
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
def trying(role: str, module: nn.Module, inputs: Inputs, where: str = "") -> Iterator[None]:
    """A forward pass of the user's model, which has that role: DataError in one line for whatever
    it raises.

    where: what the line begins with, such as "step 5: ".
    """
    with users_code(
        lambda: f"{where}the {role} ({type(module).__name__}) cannot be run on {_shapes(inputs)}"
    ):
        yield


def run(
    module: nn.Module, inputs: Inputs, device: torch.device, *, role: str, where: str = ""
) -> Output:
    """`forward` of inputs that are brought to `device`; what the user's model raises is a DataError
    in one line (see `trying`).
    """
    inputs = to_device(inputs, device, non_blocking=True)
    with trying(role, module, inputs, where):
        return forward(module, inputs)


def _shapes(inputs: Inputs) -> str:
    named = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    return ", ".join(
        f"{name} {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
        for name, x in named.items()
    )


def require_tokenizer(
    model: Model,
    tokenizer: Mapping[str, Any] | None,
    *,
    role: str,
    accept: Sequence[str] | None = None,
    whose: str = "data",
) -> list[str]:
    """IdentityMismatch if the folder of `model` names another tokenizer than that of the data or
    teacher, as `whose` says (an identity's `tokenizer`, with its fingerprint); ["tokenizer"] if
    `accept` names it, [] where both agree or one is unknown. accept None: of a command that takes
    none."""
    wanted = (tokenizer or {}).get("fingerprint")
    found = None if model.home is None or wanted is None else own_tokenizer(model.home)
    if found is None or found[0] == wanted:
        return []
    if "tokenizer" in (accept or ()):
        return ["tokenizer"]
    harmless = "" if accept is None else "; a difference known to be harmless: --accept tokenizer"
    raise IdentityMismatch(
        f"the {role} {model.spec} is for another tokenizer than the {whose}'s: an id is another "
        "token to it:\n"
        f"  tokenizer.fingerprint: the {whose} has {wanted}\n  {found[1]} has {found[0]}\n  give "
        "the tokenizer of the "
        f"{role} to the {whose}{harmless}",
        [FieldDifference("tokenizer.fingerprint", wanted, found[0])],
    )


OTHER_HEADS = {  # problem_type of a Hugging Face config -> what its logits are
    "regression": "numbers",
    "multi_label_classification": "one sigmoid for each class",
}


def require_softmax(module: nn.Module, num_classes: int, *, role: str) -> None:
    """UsageError for a model whose logits are no softmax over classes: one logit, or a config whose
    problem_type says so. To softmax one logit is always 1, and several sigmoids are one
    distribution, without a word."""
    name, problem = (
        type(module).__name__,
        getattr(getattr(module, "config", None), "problem_type", None),
    )
    if isinstance(problem, str) and problem in OTHER_HEADS:
        raise UsageError(
            f"the {role} ({name}) is for {problem}: its logits are {OTHER_HEADS[problem]}, and "
            "here they "
            "are one softmax over all classes; expected a head for single-label classification (if "
            "it is "
            "one, take problem_type out of its config)"
        )
    if num_classes == 1:
        raise UsageError(
            f"the {role} ({name}) gives one logit, whose softmax is always 1 and says nothing; "
            "expected "
            "at least two (of a sigmoid's logit z give [0, z], the same two probabilities; "
            "regression is "
            "out of scope)"
        )


def beyond_positions(model: Model, longest: int, *, role: str) -> str | None:
    """A warning where sequences of up to `longest` tokens pass the positions that the model was
    made for, None where they do not; UsageError where it has a learned table of them and cannot run
    beyond its end."""
    limit = position_limit(model.module)
    if limit is None or longest <= limit[0]:
        return None
    said = (
        f"the {role} {model.spec} is made for {limit[0]} positions (max_position_embeddings), the "
        "data has "
        f"sequences of up to {longest} tokens"
    )
    if limit[1]:
        raise UsageError(
            f"{said}: take windows of at most {limit[0]} (text: --data-arg window={limit[0]})"
        )
    return f"{said}; what it says beyond them is extrapolated"


def weights_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating-point parameter; None if there is none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def weights_digest(module: nn.Module) -> str:
    """`sha256-state-dict:` and 64 hexadecimal digits.

    SHA-256 over the tensors of `module.state_dict()` in ascending order of their names: for each
    the header of data/keys.py (name, dtype, shape; here no integer is widened), then its elements
    in C order, little-endian.
    """
    hasher = hashlib.sha256()
    with users_code(f"the weights of {type(module).__name__} cannot be read", UsageError):
        _add_weights(hasher, module)
    return f"sha256-state-dict:{hasher.hexdigest()}"


def _add_weights(hasher: Any, module: nn.Module) -> None:
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(
                f"{type(module).__name__} keeps {name!r} in its state_dict, a "
                f"{type(tensor).__name__}; "
                "expected tensors only, its weights cannot be told from others"
            )
        hasher.update(array_header(name, str(tensor.dtype).removeprefix("torch."), tensor.shape))
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def find_module(module: nn.Module, name: str) -> nn.Module:
    """The submodule with that dotted name; UsageError with near names."""
    modules: dict[str, nn.Module] = {
        known: found for known, found in module.named_modules() if known
    }
    if name not in modules:
        raise UsageError(f"{type(module).__name__} has no module {name!r}{near(name, modules)}")
    return modules[name]


def plain_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `module.state_dict()` for a file: on the CPU, each in a storage of its own,
    tied ones once.

    UsageError naming what a safetensors file cannot hold.
    """
    kept, storages, out = set[tuple[Any, ...]](), set[int](), {}
    for name, value in module.state_dict().items():
        why = (
            None
            if isinstance(value, torch.Tensor)
            else (
                f"a {type(value).__name__}; a checkpoint holds tensors: let get_extra_state give "
                "one"
            )
        )
        if why is None and (
            value.layout != torch.strided or value.is_quantized or value.is_meta or is_lazy(value)
        ):
            kind = "meta" if value.is_meta else "quantized" if value.is_quantized else value.layout
            why = f"a {kind} tensor; a checkpoint holds plain ones with their values"
        if why is not None:
            raise UsageError(
                f"the {type(module).__name__} cannot be saved: its state_dict has {name!r}, {why}"
            )
        if value.numel() and place(value) in kept:
            continue
        kept.add(place(value))
        storage = value.untyped_storage()
        plain = value.detach().cpu().contiguous()
        # Parts of one storage: each is written alone, as a copy.
        shared = (
            storage.data_ptr() in storages
            or storage.nbytes() != value.numel() * value.element_size()
        )
        storages.add(storage.data_ptr())
        out[name] = plain.clone() if shared and plain.data_ptr() == value.data_ptr() else plain
    return out


def materialise(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give the parameters and buffers of lazy modules, which have no shape before a first forward
    pass, those of
    `state`."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value) and name in state:
            lazy: Any = value
            lazy.materialize(state[name].shape)


def load_weights(module: nn.Module, weights: str | Path) -> str:
    """Load a weights file (or the model.safetensors or pytorch_model.bin of a folder) into
    `module`, and say what was loaded, and what was taken off, in a sentence; UsageError unless
    every tensor has its place."""
    path = local_path(weights, "weights")
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        path = path / next((name for name in names if (path / name).exists()), names[0])
    state, wrapped = read_weights(path)
    said = [*wrapped, *fit_weights(module, state, path)]
    return f"weights from {path}" + "".join(f", {one}" for one in said)


def fit_weights(module: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> list[str]:
    """Put the tensors of the file `path` into `module`, and give what was done for that in words:
    prefixes that were taken off their names, counters of batch norms that were missing. UsageError
    unless every tensor has its place."""
    forms = list(renamed(dict(state)))
    for form, said in forms:
        materialise(module, form)
        if not any(_misfits(module, form)):
            module.load_state_dict(form, strict=False)
            return [*said, *_without_counters(module, form)]
    found = _misfits(module, forms[0][0])
    for form, said in forms if hasattr(module, "from_pretrained") else ():
        # transformers saves some models under other names than their modules have; it alone knows
        # the way back.
        with seeded_generators(0, 0, 0):
            kind: Any = type(module)
            other, info = kind.from_pretrained(
                None,
                config=module.config,
                state_dict=form,
                dtype=weights_dtype(module),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        of_hub = (
            sorted(info["missing_keys"]),
            sorted(info["unexpected_keys"]),
            sorted(
                f"{name} {tuple(old)}, expected {tuple(new)}"
                for name, old, new in info["mismatched_keys"]
            ),
        )
        if not any(of_hub):
            module.load_state_dict(dict(other.state_dict()), strict=False)
            return said
        found = of_hub if form is forms[0][0] else found
    also = f" (and no better {forms[-1][1][0]})" if len(forms) > 1 else ""
    raise UsageError(f"{path} does not fit {type(module).__name__}: {_listed(*found)}{also}")


def _misfits(
    module: nn.Module, state: Mapping[str, torch.Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """How the names and shapes of `state` differ from those of `module`: (missing, unexpected, of
    another shape).
    """
    own = module.state_dict()
    # A tied weight is one tensor with two names, and a file may hold it under either.
    present = {place(own[name]) for name in state if name in own}
    return (
        [
            name
            for name, value in own.items()
            if name not in state
            and (is_lazy(value) or place(value) not in present)
            and not _is_counter(name, own, state)
        ],
        [name for name in state if name not in own],
        [
            f"{name} {tuple(value.shape)}, expected {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ],
    )


def _is_counter(
    name: str, own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> bool:
    """Whether a name is the counter of a batch norm whose statistics are there."""
    layer, _, last = name.rpartition(STEPS)
    return (
        not last
        and bool(layer or name == STEPS)
        and f"{layer}running_mean" in state
        and name in own
    )


def _without_counters(module: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    own = module.state_dict()
    gone = [name for name in own if name not in state and _is_counter(name, own, state)]
    return (
        [f"without the {STEPS} of {len(gone)} batch norms, which stay as they are"] if gone else []
    )


def _listed(missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    kinds = ((missing, "missing"), (unexpected, "unexpected"), (reshaped, "of another shape"))
    return "; ".join(f"{len(names)} {what}: {first_few(names)}" for names, what in kinds if names)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UsageError(f"dtype is {dtype!r}{near(dtype, DTYPES)}")
        return DTYPES[dtype]
    return dtype


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor, and not for two parts of one storage."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


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
