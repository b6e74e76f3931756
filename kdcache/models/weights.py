"""Weights: from a file as training scripts leave it into a module, and out of a module for a file.

What the tensors of a file are wrapped in, and what stands before their names, is taken off and
said. Nothing in a file is run: safetensors, or torch's unpickler for weights alone, which besides
tensors and plain values is let build an argparse.Namespace, the options that timm and many others
save beside the weights.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kdcache.data.views import seeded_generators
from kdcache.errors import UsageError
from kdcache.models.specs import first_few
from kdcache.user.code_errors import describe, reraise_interrupt
from kdcache.user.paths import local_path

State = dict[str, torch.Tensor]
# .tar: of .pth.tar, which is no archive
ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
# What the weights are called among the other things that are saved, the first that is there being
# taken.
WRAPPED = ("state_dict", "model_state_dict", "model")
# a moving average of them
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# of batch norms; older torch did not save it, and in eval mode it is not used
STEPS = "num_batches_tracked"
FOREIGN = re.compile(r"GLOBAL ([\w.]+)")  # what torch's safe unpickler stumbled over
REASON = re.compile(r"WeightsUnpickler error: (.{1,120})")


def read_weights(path: Path) -> tuple[State, list[str]]:
    """The tensors of a weights file by name, and in words what they were wrapped in. UsageError for
    what is none.
    """
    if not path.is_file():
        raise UsageError(f"weights {path}: no such file")
    if path.suffix not in ENDINGS:
        raise UsageError(
            f"weights {path}: expected a {', '.join(ENDINGS[:-1])} or .pth{ENDINGS[-1]} file"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path)), []
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    # each library and version raises its own for damaged and for foreign files
    except Exception as e:
        reraise_interrupt(e)
        code, reason = FOREIGN.search(str(e)), REASON.search(str(e))
        why = (
            f"it holds a {code[1]}, and making one may run anything"
            if code is not None
            else f"it is no pickle of plain values ({reason[1].strip()})"
            if reason is not None
            else describe(e)
        )
        raise UsageError(
            f"weights {path} cannot be read as plain tensors: {why}; expected names and tensors: "
            "torch.save(module.state_dict(), FILE), by whoever trusts it"
        ) from e
    return _unwrapped(found, path)


def renamed(state: State) -> Iterator[tuple[State, list[str]]]:
    """The tensors under their own names, then without the prefix that all of them have, one after
    another, each with what was taken off, in words: `module.` of DDP, `_orig_mod.` of
    torch.compile, `model.` of Lightning, ..."""
    yield state, []
    taken: list[str] = []
    while True:
        # AveragedModel counts what it has averaged beside the module that it wraps.
        kept = {name: value for name, value in state.items() if name != "n_averaged"}
        prefixes = {name.partition(".")[0] for name in kept}
        if len(prefixes) != 1 or not all("." in name for name in kept):
            return
        prefix = f"{prefixes.pop()}."
        state = {name.removeprefix(prefix): value for name, value in kept.items()}
        taken.append(prefix)
        yield state, [f"without {''.join(taken)!r} before all names"]


def _unwrapped(found: Any, path: Path) -> tuple[State, list[str]]:
    """The state dict in what a file holds, at most a few levels down."""
    inside: list[str] = []
    notes: list[str] = []
    while isinstance(found, Mapping) and not _is_state(found):
        averages = [key for key in AVERAGED if isinstance(found.get(key), Mapping)]
        known = next((key for key in WRAPPED if isinstance(found.get(key), Mapping)), None)
        if known is None and averages:
            known, averages = averages[0], averages[1:]
        if known is None:  # under a name of somebody's own, if there is one candidate
            states = [
                key for key, value in found.items() if isinstance(key, str) and _is_state(value)
            ]
            if len(states) != 1:
                break
            known = states[0]
        if averages:
            notes.append(
                f"its average {averages[0]!r} is not used: for that save it alone, "
                f"torch.save(checkpoint[{averages[0]!r}], FILE)"
            )
        inside.append(known)
        found = found[known]
    if not _is_state(found):
        held = f"a {type(found).__name__}"
        if isinstance(found, Mapping) and found:
            held += (
                " with "
                f"{', '.join(f'{key!r} ({type(value).__name__})' for key, value in list(found.items())[:6])}"
            )
        raise UsageError(
            f"weights {path} holds {held}; expected a state_dict, names and tensors, alone or as "
            f"{', '.join(map(repr, WRAPPED))}"
        )
    return dict(found), [*([f"of its {'.'.join(inside)!r}"] if inside else []), *notes]


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(
            isinstance(name, str) and isinstance(one, torch.Tensor) for name, one in value.items()
        )
    )


def weights_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating-point parameter; None if there is none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


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
        if value.numel() and storage_of(value) in kept:
            continue
        kept.add(storage_of(value))
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
    pass, those of `state`."""
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
    present = {storage_of(own[name]) for name in state if name in own}
    return (
        [
            name
            for name, value in own.items()
            if name not in state
            and (is_lazy(value) or storage_of(value) not in present)
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


def storage_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor, and not for two parts of one storage."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
