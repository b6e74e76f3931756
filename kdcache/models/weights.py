"""Weights files as training scripts leave them: what the tensors are wrapped in, and what stands
before their names.

Nothing in a file is run: safetensors, or torch's unpickler for weights alone, which besides tensors
and plain values is let build an argparse.Namespace, the options that timm and many others save
beside the weights.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kdcache.errors import UsageError
from kdcache.user.guard import describe, let_through

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
        let_through(e)
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
