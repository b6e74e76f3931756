"""Which model it is: the digest of its weights, and what turns equal weights into other answers,
its configuration and the tree of its modules.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kdcache.cache.canonical import MAX_INT
from kdcache.data.keys import array_header
from kdcache.errors import KDCacheError, UsageError
from kdcache.user.code_errors import reraise_interrupt, users_code

# Fields of a configuration that no answer in eval mode depends on: where it came from and by which
# version it was written, names of classes (which the data's identity has), what is returned beside
# the logits, how it is trained. `dtype` is a field of the identity itself.
NO_MATTER = re.compile(
    r"_?name_or_path|_commit_hash|transformers_version|auto_map|architectures|torch_dtype|dtype|id2label|label2id"
    r"|finetuning_task|task_specific_params|tokenizer_class|prefix|problem_type|use_cache|return_dict"
    r"|output_(hidden_states|attentions|past|scores|router_logits)|gradient_checkpointing|torchscript"
    r"|initializer_(range|factor)|.*dropout(_prob|_rate|_p)?|\w*pdrop|(\w+_)?layerdrop|_\w+_implementation\w*"
    r"|attn_implementation|loss_type|router_aux_loss_coef"
)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{6,}")
# modules that do nothing in eval mode, by how their names begin
IDENTITIES = ("Dropout", "Identity", "DropPath")
MOST_TEXT = 2000  # characters of one module's description
MOST_DEPTH = 8  # of a configuration; canonical JSON allows 16 in all


def architecture(module: nn.Module) -> dict[str, Any]:
    """`config` and `modules` of an identity's `teacher`.

    config: the fields of `module.config` (an object with `to_dict`, a mapping or a dataclass) that
    can matter, floats as text, and the attention implementation; absent where there is none.
    modules: name -> type and `extra_repr`, for all submodules but those that do nothing in eval
    mode; numbers in a name are `*` where all such modules are alike.
    """
    out: dict[str, Any] = {"modules": _modules(module)}
    config = _config(getattr(module, "config", None))
    if config is not None:
        out["config"] = config
    return out


def _config(config: Any) -> dict[str, Any] | None:
    try:
        if callable(getattr(config, "to_dict", None)):
            fields = config.to_dict()
        elif dataclasses.is_dataclass(config) and not isinstance(config, type):
            fields = dataclasses.asdict(config)
        else:
            fields = config
        if not isinstance(fields, Mapping):
            return None
        out: dict[str, Any] = _plain(fields, 0)
    except KDCacheError:
        raise
    # a configuration that cannot be told: the modules and the answers are compared
    except Exception as e:
        reraise_interrupt(e)
        return None
    attention = getattr(config, "_attn_implementation", None)
    return {**out, "attn_implementation": attention} if isinstance(attention, str) else out


def _plain(value: Any, depth: int) -> Any:
    """A value as canonical JSON can hold it."""
    if depth > MOST_DEPTH:
        return ADDRESS.sub("", repr(value))[:MOST_TEXT]
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item, depth + 1)
            for key, item in value.items()
            if not NO_MATTER.fullmatch(str(key))
        }
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < MAX_INT else str(value)
    return repr(value) if isinstance(value, float) else ADDRESS.sub("", str(value))[:MOST_TEXT]


def _modules(module: nn.Module) -> dict[str, str]:
    """What each submodule is, by name. Equal ones of a stack of layers are one entry."""
    alike: dict[str, dict[str, str]] = {}
    for name, part in module.named_modules():
        kind = type(part).__name__
        if not kind.startswith(IDENTITIES):
            # of torch.compile
            name = ".".join(step for step in name.split(".") if step != "_orig_mod")
            shape = ".".join("*" if step.isdecimal() else step for step in name.split("."))
            alike.setdefault(shape, {})[name] = f"{kind}({_extra(part)})"
    out: dict[str, str] = {}
    for shape, members in alike.items():
        out |= {shape: next(iter(members.values()))} if len(set(members.values())) == 1 else members
    return out


def _extra(part: nn.Module) -> str:
    try:
        text = part.extra_repr()
    except Exception as e:  # a module that cannot describe itself is known by its name
        reraise_interrupt(e)
        return "?"
    return ADDRESS.sub("", str(text))[:MOST_TEXT]


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
                f"{type(tensor).__name__}; expected tensors only, its weights cannot be told from "
                "others"
            )
        hasher.update(array_header(name, str(tensor.dtype).removeprefix("torch."), tensor.shape))
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
