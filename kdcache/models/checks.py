"""What a model is asked before work begins: whether it is for these tokens and this loss, which
rows it gives, and whether it gives one answer to one question.

Teachers are asked before their first shard, students before their first step. It costs a few
forward passes of one small batch, in eval mode, and no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.data.collate import Collated
from kdcache.data.padding import Inputs, Padding, decoder_inputs
from kdcache.data.row_selection import (
    CONVENTIONS,
    NEXT_TOKEN,
    POSITION,
    RECORD,
    label_evidence,
    row_starts,
    select_rows,
)
from kdcache.data.samples import evenly_spaced, pad_id_of
from kdcache.errors import DataError, FieldDifference, IdentityMismatch, UsageError, did_you_mean
from kdcache.models.model import Model, Output, forward, forward_on
from kdcache.models.specs import own_tokenizer, position_limit
from kdcache.models.weights import weights_dtype
from kdcache.user.code_errors import users_code

UNSTEADY = "unsteady"  # --accept it: no field of an identity; and the code of the warning
# that are compared of a batch: with 256,000 classes 250 MiB as float32
MOST_ROWS = 256
# unit of TensorFloat-32, in which GPUs convolve float32 unless told otherwise
TENSOR_FLOAT = 2.0**-10
CHANCE = "Is something random on in eval mode, such as dropout without training=self.training?"
SHARED = (
    "Does it normalise over the batch (BatchNorm without running statistics), attend to padding, "
    "or look for another padding id than {pad_id}?"
)
ON_THE_LEFT = (
    "The batch is padded on the left: does the model count positions from the padding on, or "
    "attend to it? Pad on the right, or let the collate_fn give position_ids too: "
    "(attention_mask.cumsum(1) - 1).clamp(0)"
)
# What Hugging Face calls models that answer for every position of their own input, and for the next
# token.
OF_POSITIONS = (
    "ForMaskedLM",
    "ForTokenClassification",
    "ForPreTraining",
    "ForConditionalGeneration",
    "ForSeq2SeqLM",
)
OF_NEXT_TOKENS = ("ForCausalLM", "LMHeadModel")
TASK_ROWS = {
    "causal-lm": NEXT_TOKEN,
    "masked-lm": POSITION,
    "token-classification": POSITION,
    "seq2seq-lm": POSITION,
    "sequence-classification": RECORD,
    "image-classification": RECORD,
}
NAME_THEM = (
    "say what its rows are: --rows position (the row at p answers for position p) or --rows "
    "next-token (for p + 1)"
)
OTHER_HEADS = {  # problem_type of a Hugging Face config -> what its logits are
    "regression": "numbers",
    "multi_label_classification": "one sigmoid for each class",
}


Run = Callable[[nn.Module, Inputs], Output]


# ---- what it is for


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
        f"token to it:\n  tokenizer.fingerprint: the {whose} has {wanted}\n  {found[1]} has "
        f"{found[0]}\n  give the tokenizer of the {role} to the {whose}{harmless}",
        [FieldDifference("tokenizer.fingerprint", wanted, found[0])],
    )


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
            "here they are one softmax over all classes; expected a head for single-label "
            "classification (if it is one, take problem_type out of its config)"
        )
    if num_classes == 1:
        raise UsageError(
            f"the {role} ({name}) gives one logit, whose softmax is always 1 and says nothing; "
            "expected at least two (of a sigmoid's logit z give [0, z], the same two "
            "probabilities; regression is out of scope)"
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
        f"data has sequences of up to {longest} tokens"
    )
    if limit[1]:
        raise UsageError(
            f"{said}: take windows of at most {limit[0]} (text: --data-arg window={limit[0]})"
        )
    return f"{said}; what it says beyond them is extrapolated"


# ---- padding


def padding_of(module: nn.Module, dataset: Any = None) -> Padding:
    """What batches for `module` are padded with: its config's pad_token_id, else the dataset's,
    else 0.
    """
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = getattr(text, "pad_token_id", None)
    pad_id = own if type(own) is int and own >= 0 else pad_id_of(dataset)
    if not getattr(config, "is_encoder_decoder", False):
        return Padding(pad_id)
    start = getattr(config, "decoder_start_token_id", None)
    padding = Padding(pad_id, start if type(start) is int else pad_id)
    shift = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    # some put a language first: their items have to bring decoder_input_ids
    if callable(shift):
        labels = torch.tensor([pad_id + 1, pad_id + 2, pad_id + 1])
        with users_code(f"prepare_decoder_input_ids_from_labels of {type(module).__name__}"):
            made = shift(labels[None])[0].cpu()
        if not torch.equal(made, decoder_inputs([labels], padding)[0]):
            return Padding(pad_id)
    return padding


# ---- rows


def check_convention(asked: str | None) -> None:
    """UsageError for rows by a convention that there is not."""
    if asked is not None and asked not in CONVENTIONS:
        raise UsageError(
            f"--rows {asked!r} is unknown{did_you_mean(str(asked), CONVENTIONS)}; expected one of "
            f"{', '.join(CONVENTIONS)}"
        )


def find_rows(
    module: nn.Module,
    batch: Collated,
    output: Output,
    *,
    asked: str | None = None,
    task: str = "",
    device: torch.device,
    role: str,
    run: Run | None = None,
    num_classes: int | None = None,
) -> tuple[str, str]:
    """(convention, why) of the rows of a model that answered `batch` with `output`; it is in eval
    mode, on `device`.

    What is asked for holds; else the shape of the logits, the task or architecture, and, of logits
    for each token of the input, whether the model is causal: it is asked once more with the second
    half of a record's tokens changed. run: how it was asked, for hidden states in place of logits;
    by default `forward`. num_classes: how many logits the model gives, where these are hidden
    states. DataError where the convention cannot be that of these logits, and where nothing decides
    it.
    """
    check_convention(asked)
    shape, name = tuple(output.logits.shape), type(module).__name__
    if asked is not None:
        if (asked == RECORD) != (len(shape) == 2):
            raise DataError(
                f"--rows {asked}: the {role} ({name}) gives logits {list(shape)}; expected "
                f"{'(records, classes)' if asked == RECORD else '(records, positions, classes)'}"
            )
        return asked, "as asked"
    if len(shape) == 2:
        return RECORD, "its logits are (records, classes)"
    ids_BL, by_task = batch.ids_BL, TASK_ROWS.get(task) or _by_name(module)
    if ids_BL is None:
        return POSITION, "its inputs are no tokens"
    assert isinstance(batch.inputs, dict)
    if any(key.startswith("decoder_") for key in batch.inputs):
        return POSITION, "it decodes from decoder inputs"
    if ids_BL.shape[1] != shape[1]:
        return (
            POSITION,
            f"its logits are for {shape[1]} positions, its input has {ids_BL.shape[1]} tokens",
        )
    if by_task == POSITION:
        return POSITION, f"it is for {task or name}"
    causal, evidence = is_causal(module, batch, output, device, role, run), label_evidence(batch)
    if by_task == NEXT_TOKEN and causal is False:
        raise DataError(
            f"the {role} ({name}) is taken for a causal language model, but what it says of a "
            f"token changes with the tokens after it, so that it does not predict them; {NAME_THEM}"
        )
    if causal is False:
        return (
            POSITION,
            "what it says of a token changes with the tokens after it, so that it does not predict "
            "them",
        )
    classes = shape[2] if num_classes is None else num_classes
    beyond = int(ids_BL[batch.real_BL].max()) >= classes if batch.real_BL is not None else False
    if beyond and evidence == "other":
        return (
            POSITION,
            f"its {classes} classes are fewer than the tokens, and the labels are none of them",
        )
    if beyond and evidence is None and by_task is None:
        raise DataError(
            f"the {role} ({name}) gives {classes} logits for each token, and the tokens go up to "
            f"{int(ids_BL.max())}, so that it may predict something else than tokens; {NAME_THEM}"
        )
    if evidence == "other":
        raise DataError(
            f"the {role} ({name}) looks at no later token, as a model that predicts the next one, "
            "but the labels are not the tokens (labels[p] == input_ids[p] where labels[p] >= 0); "
            f"{NAME_THEM}"
        )
    if evidence == "next":
        return POSITION, "labels[p] is the token after p already"
    if causal is None and by_task is None and evidence is None:
        return NEXT_TOKEN, "no record has two tokens to tell by"
    return NEXT_TOKEN, "it looks at no later token" + (
        "" if evidence is None else ", and the labels are the tokens"
    )


def is_causal(
    module: nn.Module,
    batch: Collated,
    output: Output,
    device: torch.device,
    role: str,
    run: Run | None = None,
) -> bool | None:
    """Whether what the model says of the first half of a record's tokens leaves the second half out
    of account.

    One forward pass: the batch again, with every token of that half another one of the batch. None
    where no record has two tokens.
    """
    ids_BL, real_BL, lengths = batch.ids_BL, batch.real_BL, batch.lengths
    assert (
        ids_BL is not None
        and real_BL is not None
        and lengths is not None
        and isinstance(batch.inputs, dict)
    )
    record = int(lengths.argmax())
    positions = real_BL[record].nonzero()[:, 0]
    if len(positions) < 2:
        return None
    first, second = positions[: len(positions) // 2], positions[len(positions) // 2 :]
    known = torch.unique(ids_BL[real_BL.to(ids_BL.device)])
    if len(known) > 1:
        at = torch.searchsorted(known, ids_BL[record, second].contiguous())
        others = known[(at + 1) % len(known)]
    else:
        others = torch.where(ids_BL[record, second] > 0, ids_BL[record, second] - 1, 1)
    changed_BL = ids_BL.clone()
    changed_BL[record, second] = others.to(ids_BL.dtype)
    inputs = {**batch.inputs, "input_ids": changed_BL}
    with torch.inference_mode():
        again = forward_on(module, inputs, device, role=role, run=run or forward)
    before, after = (x.logits[record, first.to(device)].float() for x in (output, again))
    eps = unit(module, output.logits.dtype, device)
    # A causal model repeats itself to the bit, but for sums over other groups of tokens (experts):
    # a few roundings.
    size = float(before.nan_to_num(0, 0, 0).abs().amax())
    return _apart(before, after) <= min(32 * eps, math.sqrt(eps)) * size


def _by_name(module: nn.Module) -> str | None:
    """The convention that a Hugging Face model's class is named after."""
    if not hasattr(module, "config"):
        return None
    name = type(module).__name__
    return (
        NEXT_TOKEN
        if name.endswith(OF_NEXT_TOKENS)
        else POSITION
        if name.endswith(OF_POSITIONS)
        else None
    )


# ---- one answer to one question


@dataclass(frozen=True, slots=True)
class Steadiness:
    """The most that logits of some rows differed by when asked again, and when their record was
    asked alone (None: of a batch of one record); what rounding can explain; `problem` says what it
    cannot, in a sentence. harmless: whether somebody may know that it does no harm, which padding
    on the left does."""

    again: float
    alone: float | None
    rounding: float
    problem: str | None = None
    harmless: bool = True


def unit(module: nn.Module, logits: torch.dtype, device: torch.device) -> float:
    """The coarsest unit of rounding on the way from weights to what is compared, which is float32:
    2^-23 for that.
    """
    eps = max(
        torch.finfo(dtype).eps for dtype in (torch.float32, logits, weights_dtype(module) or logits)
    )
    return max(float(eps), TENSOR_FLOAT) if device.type == "cuda" else float(eps)


def explained(size: float, eps: float) -> float:
    """The most that rounding is believed to move values of up to `size`: half of their digits,
    sqrt(eps) size.

    n roundings in a row that do not conspire move a value by sqrt(n) eps of its size: sqrt(eps) are
    8 million of them in float32 and 128 in bfloat16, whose sums are kept in float32. What dropout
    or the statistics of a batch change lies in the first digit or two.
    """
    return math.sqrt(eps) * size


def telling_records(wanted: Sequence[int], extreme: Sequence[int]) -> list[int]:
    """The samples of a batch that tells most: those `wanted`, with the `extreme` ones, the shortest
    and the longest known, in place of the last where they are not among them."""
    ids, more = list(wanted), [i for i in extreme if i not in wanted]
    if len(ids) < 2 or not more:
        return ids
    return [*ids[: max(len(ids) - len(more), 0)], *more]


@dataclass(frozen=True, slots=True)
class Question:
    """Who is asked about what: a model in eval mode on its `device`, in a role that errors call it
    by.

    read: sample ids -> the batch of these, whole or one alone. convention: which rows count; None
    compares every real position. collate_fn: of the dataset so named, whose inputs are compared
    too. context: what to run the model in; run: how, for hidden states in place of logits.
    """

    module: nn.Module
    device: torch.device
    read: Callable[[Sequence[int]], Collated]
    convention: str | None
    role: str = "teacher"
    collate_fn: str | None = None
    pad_id: int = 0
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    run: Run = forward


@torch.inference_mode()
def steadiness(asked: Question, ids: Sequence[int]) -> Steadiness | None:
    """Ask a model twice about a batch of samples, and once about the record with the most padding
    alone.

    None without rows. It costs two forward passes of a batch and one of a record. DataError where
    the dataset's `collate_fn` gives one record other inputs in another batch.
    """
    who, batch = f"the {asked.role} ({type(asked.module).__name__})", asked.read(ids)
    _check_repeats(asked, batch, ids)
    logits_NV, offsets = _rows(asked, batch)
    if not len(logits_NV):
        return None
    picked, counts_B = evenly_spaced(len(logits_NV), MOST_ROWS), np.diff(offsets)
    one = _most_padded(batch, counts_B)
    own = np.array(evenly_spaced(int(counts_B[one]), MOST_ROWS))
    first, mine = logits_NV[picked].float(), logits_NV[offsets[one] + own].float()
    eps = unit(asked.module, logits_NV.dtype, asked.device)
    # before the next ones: rows of a large vocabulary are gigabytes
    del logits_NV
    second_NV = _rows(asked, batch)[0]
    again = (
        _apart(first, second_NV[picked].float())
        if second_NV.shape[1] == first.shape[1]
        else math.inf
    )
    size = float(torch.cat([first, mine]).nan_to_num(0, 0, 0).abs().amax())
    rounding = explained(size, eps)
    known = f"; rounding explains {rounding:.3g} in values of up to {size:.3g}"
    if again > rounding:
        return Steadiness(
            again,
            None,
            rounding,
            f"{who} answers differently each time: asked twice about {_named(ids)}, its logits "
            f"differ by up to {again:.3g}{known}. {CHANCE}",
        )
    if len(batch) == 1:
        return Steadiness(again, None, rounding)
    sample, shared = ids[one], SHARED.format(pad_id=asked.pad_id)
    single = asked.read([sample])
    _check_alone(asked, batch, single, one, sample)
    try:
        alone_NV, _ = _rows(asked, single)
    except DataError as e:
        return Steadiness(
            again, math.inf, rounding, f"{e}, which is sample {sample} alone. {shared}"
        )
    same = len(alone_NV) == counts_B[one] and alone_NV.shape[1] == mine.shape[1]
    alone = _apart(mine, alone_NV[own].float()) if same else math.inf
    if alone > rounding:
        padding_B = batch.real.padding_B
        padding = 0 if padding_B is None else int(padding_B[one])
        left = bool((row_starts(batch) > 0).any())
        shared = ON_THE_LEFT if left else shared
        problem = (
            f"{who} answers by what shares its batch: the logits of sample {sample} differ by up "
            f"to {alone:.3g} between a batch of "
            f"{len(batch)}{f', with {padding} positions of padding,' if padding else ''} and "
            f"alone{known}. {shared}"
        )
        return Steadiness(again, alone, rounding, problem, harmless=not left)
    return Steadiness(again, alone, rounding)


def _most_padded(batch: Collated, counts_B: Any) -> int:
    """The record with rows that has the most padding; of several the one with the fewest rows."""
    padding_B = batch.real.padding_B
    if padding_B is None:
        padding_B = np.zeros(len(batch), np.int64)
    order = np.lexsort((counts_B, -padding_B, counts_B == 0))
    return int(order[0])


def _check_repeats(asked: Question, batch: Collated, ids: Sequence[int]) -> None:
    """DataError for a collate_fn that does not give the same inputs when it is given the same items
    again.
    """
    if asked.collate_fn is None or batch.view_key is None:
        return
    again = asked.read(ids)
    if (
        again.view_key is not None
        and (wrong := np.flatnonzero(again.view_key != batch.view_key)).size
    ):
        raise DataError(
            f"collate_fn of dataset {asked.collate_fn} gives other inputs each time: sample "
            f"{ids[wrong[0]]} differs between two batches of the same items; what it draws by "
            "chance belongs into dataset.view(sample_id, view, rng)"
        )


def _check_alone(
    asked: Question, batch: Collated, single: Collated, record: int, sample: int
) -> None:
    """DataError for a collate_fn whose inputs for a record depend on the others of its batch."""
    if asked.collate_fn is None or batch.view_key is None or single.view_key is None:
        return
    if batch.view_key[record] != single.view_key[0]:
        raise DataError(
            f"collate_fn of dataset {asked.collate_fn} gives sample {sample} other inputs in a "
            f"batch of {len(batch)} than alone: it mixes its records, or pads them without a mask "
            "that says so. Mixing belongs into dataset.view(sample_id, view, rng), which gives one "
            "record; padded inputs need an attention_mask (or another 2-D input of 0 and 1 whose "
            "name ends in 'mask')"
        )


def _rows(asked: Question, batch: Collated) -> tuple[Tensor, Any]:
    """The logits [N, V] of the rows of a batch that count, and the offsets [B + 1] of each
    record's.
    """
    with asked.context():
        output = forward_on(
            asked.module, batch.inputs, asked.device, role=asked.role, run=asked.run
        )
    logits = output.logits
    if asked.convention is None:
        mask_BL = batch.real.of(logits.shape[1]) if logits.ndim == 3 else None
        if logits.ndim == 3 and mask_BL is None:
            mask_BL = torch.ones(logits.shape[:2], dtype=torch.bool)
    else:
        shape = tuple(logits.shape)
        selection = select_rows(batch, shape, asked.convention, output.row_mask, shape[-1])
        mask_BL = None if selection is None else selection.mask_BL
    if mask_BL is None:
        return logits, np.arange(len(batch) + 1)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(mask_BL.sum(1).numpy())])
    return logits[mask_BL.to(asked.device)], offsets


def _named(ids: Sequence[int]) -> str:
    """Samples in words: those that follow one another as a range."""
    parts: list[list[int]] = []
    for i in ids:
        if parts and i == parts[-1][-1] + 1:
            parts[-1].append(i)
        else:
            parts.append([i])
    said = [f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
    return (
        f"sample{'s' if len(ids) > 1 else ''} "
        f"{', '.join(said[:6])}{', ...' if len(said) > 6 else ''}"
    )


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where one is and the other is not. Two NaNs are alike: the
    dump names them.
    """
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs()).nan_to_num(
        math.inf, math.inf
    )
    return float(apart.amax()) if apart.numel() else 0.0
