"""What a model was asked, and what of its answer is a row: every way in, its right value or one
clear refusal.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from teacher_world import Points, mlp
from torch import Tensor, nn

import kdcache
from kdcache.cache.features import decode_feature
from kdcache.data.collate import beyond_tokens, collate, read_batch
from kdcache.data.padding import Padding
from kdcache.data.samples import Samples, extremes
from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.models.checks import Question, padding_of, steadiness, telling_records
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher
from kdcache.teacher.verify import verify

CPU = torch.device("cpu")


class Listed(list):  # type: ignore[type-arg]
    name = "listed"


def sentences(count: int = 12, vocab: int = 20, **more: Any) -> Listed:
    """Token sequences of 3 to 7 tokens."""
    rng = np.random.default_rng(5)
    return Listed(
        {
            "input_ids": torch.from_numpy(rng.integers(1, vocab, 3 + i % 5)),
            **{name: make(i, 3 + i % 5) for name, make in more.items()},
        }
        for i in range(count)
    )


class Reader(nn.Module):
    """Causal: what it says at p is a sum over the tokens up to p; `extra` inputs are added."""

    def __init__(self, classes: int = 20, vocab: int = 20) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(vocab, 8), nn.Linear(8, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Tensor
    ) -> Tensor:
        x = self.embed(input_ids)
        x = x if attention_mask is None else x * attention_mask[..., None]
        return self.head(x.cumsum(1) + sum(value.float()[..., None] for value in extra.values()))


class Tagger(Reader):
    """Not causal: the whole sentence is in every answer."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Tensor
    ) -> Tensor:
        x = self.embed(input_ids)
        x = x if attention_mask is None else x * attention_mask[..., None]
        return self.head(x + x.sum(1, keepdim=True))


class Faint(Reader):
    """Its logits grow and shrink with all tokens by up to this part of themselves: of 1e-6 sums of
    float32 in another grouping could be the reason, of 1e-4 not."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self.part = part

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Tensor
    ) -> Tensor:
        whole_B11 = input_ids.sum(1)[:, None, None]
        return super().forward(input_ids, attention_mask, **extra) * (
            1 + self.part * torch.sin(whole_B11)
        )


def dump(out: Path, teacher: nn.Module, data: Any, **options: Any) -> Any:
    return dump_teacher(teacher=teacher, data=data, out=out, device="cpu", batch_size=5, **options)


# ---- which rows
# -----------------------------------------------------------------------------------------------


def tokens_as_labels(shift: int) -> Listed:
    data = sentences()
    for item in data:
        ids = item["input_ids"]
        item["labels"] = ids if not shift else torch.cat([ids[1:], torch.tensor([7])])
    return data


def tags(i: int, length: int) -> Tensor:
    return torch.arange(length) % 3


@pytest.mark.parametrize(
    ("teacher", "data", "rows", "why"),
    [
        (Reader(), sentences(), "next-token", "looks at no later token"),
        (Reader(), tokens_as_labels(0), "next-token", "the labels are the tokens"),
        (Reader(), tokens_as_labels(1), "position", "is the token after p already"),
        (Tagger(), sentences(labels=tags), "position", "changes with the tokens after it"),
        (Tagger(), sentences(), "position", "changes with the tokens after it"),
        (Faint(1e-4), sentences(), "position", "changes with the tokens after it"),
        (Faint(1e-6), sentences(), "next-token", "looks at no later token"),
        (Reader(3), sentences(labels=tags), "position", "fewer than the tokens"),
        (mlp(), Points(), "record", r"\(records, classes\)"),
    ],
)
def test_what_a_row_is_follows_from_the_model_and_is_said(
    tmp_path: Path, teacher: nn.Module, data: Any, rows: str, why: str
) -> None:
    said: list[str] = []
    dump(tmp_path / "c", teacher, data, say=said.append)
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.spec.convention == rows
    (line,) = [line for line in said if line.startswith("rows by ")]
    assert line.startswith(f"rows by {rows} (") and re.search(why, line)


@pytest.mark.parametrize(
    ("teacher", "data", "options", "message"),
    [
        (
            Reader(),
            sentences(labels=tags),
            {},
            "the labels are not the tokens .* --rows position .* or --rows next-token",
        ),
        (
            Reader(3),
            sentences(),
            {},
            "may predict something else than tokens; say what its rows are",
        ),
        (
            Reader(),
            sentences(),
            {"rows": "record"},
            r"--rows record: the teacher \(Reader\) gives logits",
        ),
        (
            mlp(),
            Points(),
            {"rows": "position"},
            r"--rows position: .* expected \(records, positions, classes\)",
        ),
        (
            mlp(),
            Points(),
            {"rows": "token"},
            "--rows 'token' is unknown.*expected one of record, position, next-token",
        ),
        (
            Reader(),
            sentences(labels=lambda i, n: torch.full((n,), -100)),
            {},
            "no row in any of the 12 samples looked at",
        ),
        (
            Reader(),
            Listed([{"input_ids": torch.tensor([3])}] * 4),
            {},
            "no row in any of the 4 samples",
        ),
        (
            Reader(),
            Listed([*sentences(2), {"input_ids": torch.zeros(0, dtype=torch.int64)}]),
            {},
            "sample 2: it has no tokens",
        ),
        (Reader(), Listed([*sentences(2), {"input_ids": []}]), {}, "sample 2: it has no tokens"),
    ],
)
def test_where_nothing_decides_it_is_refused_by_name(
    tmp_path: Path, teacher: nn.Module, data: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(KDCacheError, match=message):
        dump(tmp_path / "c", teacher, data, **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "item",
    [
        {"input_ids": [[1, 2], [3]]},
        {"input_ids": [1, None]},
        {"frames": [[1.0], [2.0, 3.0]], "mask": [1, [2]]},
        {"input_ids": object()},
        {"x": {"deep": [1]}},
    ],
)
@pytest.mark.parametrize("collates", [False, True])
def test_an_item_that_is_no_array_is_one_line(tmp_path: Path, item: Any, collates: bool) -> None:
    class Odd(Listed):
        pass

    if collates:
        Odd.collate_fn = staticmethod(lambda items: {"input_ids": torch.ones(len(items), 4).long()})  # type: ignore[attr-defined]
    with pytest.raises(KDCacheError) as caught:
        dump(tmp_path / "c", Reader(), Odd([item] * 3))
    assert "\n" not in str(caught.value)


def test_asked_for_rows_hold_in_both_stages(tmp_path: Path) -> None:
    """A tagger that looks at no other token cannot be told from a language model: --rows says
    which.
    """
    data, teacher = sentences(labels=tags), Reader(3)
    dump(tmp_path / "c", teacher, data, rows="position")
    for source in (
        {"cache": tmp_path / "c", "data": data},
        {"cache": tmp_path / "c"},
        {"data": data, "alpha": 0.0},
    ):
        seen: list[Any] = []
        options = {"rows": "position"} if "cache" not in source else {}
        report = train_student(
            student=Reader(3),
            out=tmp_path / f"r-{'-'.join(source)}",
            max_steps=1,
            batch_size=12,
            device="cpu",
            lr=0.0,
            optimizer="sgd",
            on_step=seen.append,
            **source,
            **options,
        )
        logits = [teacher(item["input_ids"][None])[0] for item in data]
        want = nn.functional.cross_entropy(
            torch.cat(logits), torch.cat([item["labels"] for item in data])
        )
        assert report.training["ce"] == pytest.approx(want.item(), rel=1e-5)
    with pytest.raises(
        UsageError, match="--rows next-token: those of the cache are by position; leave it out"
    ):
        train_student(
            student=Reader(3),
            cache=tmp_path / "c",
            out=tmp_path / "x",
            max_steps=1,
            rows="next-token",
            device="cpu",
        )


def test_a_student_that_sees_the_tokens_it_is_to_predict_is_refused(tmp_path: Path) -> None:
    dump(tmp_path / "c", Reader(), sentences())
    options: dict[str, Any] = dict(
        student=Tagger(20), cache=tmp_path / "c", max_steps=1, device="cpu"
    )
    with pytest.raises(
        DataError, match=r"the student \(Tagger\) looks at later tokens, .* --rows next-token"
    ):
        train_student(**options, out=tmp_path / "r")
    assert train_student(**options, out=tmp_path / "r", rows="next-token").finished


def test_decoder_inputs_are_made_as_the_model_makes_them_or_not_at_all() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=30,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
    )
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    data = sentences(4, labels=lambda i, n: torch.arange(3, 4 + i))
    samples = Samples(data)
    samples.padding = padding_of(bart)
    batch = read_batch(samples, [(i, 0) for i in range(4)])
    assert batch.labels is not None and isinstance(batch.inputs, dict)
    want = bart.prepare_decoder_input_ids_from_labels(batch.labels)
    mask = batch.inputs["decoder_attention_mask"] != 0
    assert torch.equal(batch.inputs["decoder_input_ids"][mask], want[mask])
    assert mask.sum(1).tolist() == [len(item["labels"]) for item in data]
    mbart = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**sizes))
    # it begins with the language, the last of the labels
    assert padding_of(mbart).decoder_start is None


def test_tokens_that_the_model_cannot_predict_are_no_rows_and_are_kept(tmp_path: Path) -> None:
    """An image's place, say: read, and never answered."""

    class Seeing(Reader):
        def get_input_embeddings(self) -> nn.Module:
            return self.embed

    data = Listed({"input_ids": torch.tensor([3, 25, 4, 5])} for _ in range(3))
    dump(tmp_path / "c", Seeing(20, 30), data, rows="next-token")
    with kdcache.open(tmp_path / "c") as cache:
        batch = cache.read(np.arange(3))
        assert cache.spec.vocabulary == 30 and batch.columns["token"].tolist() == [3, 25, 4, 5] * 3
        assert (
            batch.columns["pos"].tolist() == [1, 2] * 3
            and batch.columns["label"][:, 0].tolist() == [4, 5] * 3
        )
    train_student(
        student=Seeing(20, 30), cache=tmp_path / "c", out=tmp_path / "r", max_steps=1, device="cpu"
    )


def test_label_weights_of_tokens_are_kept(tmp_path: Path) -> None:
    """The weight of a token's label goes where its label goes: to the row before, with a cache as
    without one.
    """
    data = sentences(
        label_weight=lambda i, n: torch.arange(n) % 2 * 0.5 + 0.25,
        labels=lambda i, n: torch.zeros(n),
    )
    for item in data:
        item["labels"] = item["input_ids"]
    dump(tmp_path / "c", Reader(), data)
    want = torch.cat([item["label_weight"][1:] for item in data])
    for options in (
        {"data": data},
        {"cache": tmp_path / "c"},
        {"cache": tmp_path / "c", "data": data},
    ):
        (batch,) = kdcache.Loader(
            options.get("cache"), options.get("data"), batch_size=12, shuffle=False
        )
        assert batch["label_weight"] is not None and torch.equal(
            batch["label_weight"].reshape(-1), want
        )


# ---- what was asked
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "beyond"),
    [
        ({}, None),
        ({"attention_mask": lambda i, n: torch.ones(n)}, None),
        ({"token_type_ids": lambda i, n: torch.zeros(n, dtype=torch.int64)}, None),
        ({"position_ids": lambda i, n: torch.arange(n)}, None),
        (
            {"token_type_ids": lambda i, n: torch.ones(n, dtype=torch.int64)},
            "token_type_ids of its own",
        ),
        ({"position_ids": lambda i, n: torch.arange(n) % 2}, "position_ids of its own"),
        ({"lang": lambda i, n: torch.tensor(i)}, r"lang \[12\]"),
        (
            {"attention_mask": lambda i, n: (torch.arange(n) > 0).long()},
            "an attention_mask that hides tokens or pads",
        ),
    ],
)
def test_tokens_stand_for_a_question_only_where_they_are_all_of_it(
    tmp_path: Path, more: Any, beyond: str
) -> None:
    data = sentences(**more)
    samples = Samples(data)
    found = beyond_tokens(read_batch(samples, [(i, 0) for i in range(12)]))
    assert found is None if beyond is None else re.match(beyond, found or "")
    inputs = sorted({"input_ids", *more})

    class Any_(Reader):
        def forward(self, input_ids: Tensor, **extra: Tensor) -> Tensor:
            return super().forward(input_ids)

    dump(tmp_path / "c", Any_(), data, rows="next-token", accept=["unsteady"])
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.spec.tokens == (beyond is None) and cache.identity.data["inputs"] == inputs
    if beyond is not None:
        with pytest.raises(UsageError, match=f"given {', '.join(inputs)}.*give --data"):
            kdcache.Loader(tmp_path / "c", batch_size=4)
        with pytest.raises(UsageError, match="--tokens: the teacher was given"):
            dump(tmp_path / "d", Any_(), data, rows="next-token", tokens=True)
    next(iter(kdcache.Loader(tmp_path / "c", data, batch_size=4)))


def test_a_record_that_asks_more_than_its_tokens_say_stops_a_dump_that_keeps_them(
    tmp_path: Path,
) -> None:
    data = sentences(300, attention_mask=lambda i, n: torch.ones(n))
    # none of those that a probe looks at
    data[101]["attention_mask"] = torch.tensor([0, 1, 1, 1])
    with pytest.raises(
        DataError,
        match=r"samples 100 to 104: the teacher was given an attention_mask .* --no-tokens",
    ):
        dump(tmp_path / "c", Reader(), data, records_per_shard=100)
    assert dump(tmp_path / "d", Reader(), data, tokens=False).complete


class Shifted(Listed):
    """Tokens padded on the left by a collate_fn that gives no mask."""

    @staticmethod
    def collate_fn(items: list[Any]) -> Any:
        width = max(len(item["input_ids"]) for item in items)
        return {
            "input_ids": torch.stack(
                [
                    nn.functional.pad(item["input_ids"], (width - len(item["input_ids"]), 0))
                    for item in items
                ]
            )
        }


class Inverting(Points):
    def collate_fn(self, items: list[Any]) -> Any:
        return -torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


class Mixing(Points):
    def collate_fn(self, items: list[Any]) -> Any:
        x = torch.stack([x for x, _ in items])
        return 0.7 * x + 0.3 * x.flip(0), torch.stack([y for _, y in items])


class Stacking(Points):
    def collate_fn(self, items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


class Chancy(Points):
    def collate_fn(self, items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]) + torch.randn(1), torch.stack(
            [y for _, y in items]
        )


@pytest.mark.parametrize(
    ("teacher", "data", "message"),
    [
        (
            Reader(),
            Shifted(sentences()),
            "gave no attention_mask, and record . of the batch does not begin with its",
        ),
        (
            mlp(),
            Mixing(),
            "collate_fn of dataset points gives sample .* other inputs in a batch of 5 than alone: "
            "it mixes",
        ),
        (mlp(), Chancy(), "collate_fn of dataset points gives other inputs each time"),
    ],
)
def test_a_collate_fn_that_cuts_mixes_or_throws_dice_is_named(
    tmp_path: Path, teacher: nn.Module, data: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        dump(tmp_path / "c", teacher, data)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("seen", "given", "message"),
    [
        (Points, Inverting, "the collate_fn of the data changes what the model is given"),
        (Points, Mixing, "the collate_fn of the data changes what the model is given"),
        (Stacking, Inverting, "view_key in the cache is"),
        (Stacking, Points, "has view keys, the data gives none"),
        (Inverting, Stacking, "view_key in the cache is"),
        (Points, Stacking, None),
        (Inverting, Inverting, None),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_students_collate_fn_makes_of_the_data_is_what_the_teacher_was_given(
    tmp_path: Path, seen: Any, given: Any, message: str | None, workers: int
) -> None:
    if workers and message is None:
        return
    dump(tmp_path / "c", mlp(), seen())
    loader = kdcache.Loader(tmp_path / "c", given(), batch_size=10, workers=workers)
    if message is None:
        assert len(list(loader)) == 5
        return
    with pytest.raises(DataError, match=f"{message}.*--accept view_key|{message}"):
        list(loader)
    assert (
        len(list(kdcache.Loader(tmp_path / "c", given(), batch_size=10, accept=["view_key"]))) == 5
    )


# ---- padding
# --------------------------------------------------------------------------------------------------


def test_padding_takes_the_models_id_and_every_padded_input_a_mask() -> None:
    data = sentences(4, decoder_input_ids=lambda i, n: torch.ones(9 - n, dtype=torch.int64))
    samples = Samples(data)
    samples.padding = Padding(pad_id=17)
    batch = read_batch(samples, [(i, 0) for i in range(4)])
    assert isinstance(batch.inputs, dict)
    for ids, mask in (
        ("input_ids", "attention_mask"),
        ("decoder_input_ids", "decoder_attention_mask"),
    ):
        lengths = torch.tensor([len(item[ids]) for item in data])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        assert torch.equal(batch.inputs[mask] != 0, real) and (batch.inputs[ids][~real] == 17).all()
    config = SimpleNamespace(pad_token_id=3, is_encoder_decoder=True, decoder_start_token_id=5)
    model = nn.Linear(1, 1)
    assert padding_of(model) == Padding(0) and padding_of(
        model, SimpleNamespace(pad_token_id=8)
    ) == Padding(8)
    model.config = config
    assert padding_of(model, SimpleNamespace(pad_token_id=8)) == Padding(3, 5)
    config.decoder_start_token_id = None
    assert padding_of(model) == Padding(3, 3)


def test_a_mask_or_lengths_of_the_items_are_enough() -> None:
    for name, give in (
        ("src_mask", lambda n: torch.ones(n)),
        ("lengths", lambda n: torch.tensor(n)),
    ):
        data = Listed({"frames": torch.ones(n, 2), name: give(n)} for n in (2, 4))
        batch = collate([Samples(data).item(i) for i in range(2)])
        assert isinstance(batch.inputs, dict) and batch.inputs.keys() == {"frames", name}
        real = batch.real.of(4)
        assert real is not None and real.tolist() == [[True, True, False, False], [True] * 4]
    keys = Listed(
        {"frames": torch.ones(n, 2), "key_padding_mask": torch.zeros(n, dtype=torch.bool)}
        for n in (2, 4)
    )
    # true where torch's attention sees padding
    inverted = collate([Samples(keys).item(i) for i in range(2)])
    assert isinstance(inverted.inputs, dict) and inverted.inputs["key_padding_mask"][
        0
    ].tolist() == [0, 0, 1, 1]
    assert inverted.real.of(4) is not None and inverted.real.of(4).sum(1).tolist() == [2, 4]  # type: ignore[union-attr]


def test_what_only_looks_like_a_mask_or_lengths_is_none() -> None:
    """A number that equals the lengths by chance does not stand in for the mask of a batch."""
    for name, value in (
        ("lang", [2, 4]),
        ("loss_mask", [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ("mask_places", [[0, 1]] * 2),
        ("song_length", [7, 9]),
    ):
        data = Listed(
            {"frames": torch.ones(n, 2), name: torch.tensor(one)}
            for n, one in zip((2, 4), value, strict=True)
        )
        batch = collate([Samples(data).item(i) for i in range(2)])
        assert isinstance(batch.inputs, dict) and batch.inputs["attention_mask"].tolist() == [
            [1, 1, 0, 0],
            [1] * 4,
        ]
        assert {mask.shape[1] for mask in batch.real.masks.values()} == {
            4
        } and name not in batch.real.masks


def test_packed_position_ids_take_no_mask_whatever_shares_the_batch() -> None:
    data = Listed(
        {"input_ids": torch.arange(n), "position_ids": torch.arange(n) % 3} for n in (7, 7, 4)
    )
    samples = Samples(data)
    for ids in ([0, 1], [0, 2], [2]):
        batch = read_batch(samples, [(i, 0) for i in ids])
        assert isinstance(batch.inputs, dict) and batch.inputs.keys() == {
            "input_ids",
            "position_ids",
        }
        assert batch.lengths is not None and batch.lengths.tolist() == [
            len(data[i]["input_ids"]) for i in ids
        ]
    plain = Listed({"input_ids": torch.arange(n), "position_ids": torch.arange(n)} for n in (7, 4))
    batch = read_batch(Samples(plain), [(0, 0), (1, 0)])
    assert isinstance(batch.inputs, dict) and "attention_mask" in batch.inputs


@pytest.mark.parametrize(
    ("recipe", "want"),
    [("pool", lambda x: x.mean(0)), ("last", lambda x: x[-1]), ("cls", lambda x: x[0])],
)
@pytest.mark.parametrize("name", ["attention_mask", "word_mask", "word_length"])
@pytest.mark.parametrize("left", [False, True])
def test_features_leave_padding_out_by_any_mask(
    tmp_path: Path, recipe: str, want: Any, name: str, left: bool
) -> None:
    """Against the activation of each record alone, unpadded; padded by the dataset's own
    collate_fn.
    """

    class Padded(Listed):
        @staticmethod
        def collate_fn(items: list[Any]) -> Any:
            width = max(len(item["words"]) for item in items)
            gaps = [width - len(item["words"]) for item in items]
            sides = [(gap, 0) if left else (0, gap) for gap in gaps]
            words = torch.stack(
                [
                    nn.functional.pad(item["words"], side, value=9)
                    for item, side in zip(items, sides, strict=True)
                ]
            )
            mask = torch.stack(
                [
                    nn.functional.pad(torch.ones(len(item["words"])), side)
                    for item, side in zip(items, sides, strict=True)
                ]
            )
            return {"words": words, name: mask if "mask" in name else mask.sum(1).long()}

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 4)

        def forward(self, words: Tensor, **mask: Tensor) -> Tensor:
            x, real = self.embed(words), next(iter(mask.values()))
            real = (
                real if real.dim() == 2 else (torch.arange(words.shape[1]) < real[:, None]).float()
            )
            return self.head((x * real[..., None]).sum(1))

    if left and name == "word_length":
        return  # lengths do not say on which side
    net = Encoder()
    data = Padded({"words": item["input_ids"]} for item in sentences())
    dump(tmp_path / "c", net, data, features=[f"embed:{recipe}:float32"])
    with kdcache.open(tmp_path / "c") as cache:
        (feature,) = cache.spec.features
        found = decode_feature(feature, cache.read(np.arange(12)).columns)
    with torch.no_grad():
        alone = torch.stack([want(net.embed(item["words"])) for item in data])
    np.testing.assert_allclose(found, alone.numpy(), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("feature", ["embed:raw", "embed:map"])
def test_a_feature_that_would_keep_padding_is_refused_whatever_the_batch_size(
    tmp_path: Path, feature: str, batch_size: int
) -> None:
    class Classifier(Reader):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Tensor
        ) -> Tensor:
            return super().forward(input_ids, attention_mask)[:, -1]

    with pytest.raises(
        UsageError, match=f"recipe '{feature.split(':')[1]}'.* would keep the padding|square grid"
    ):
        dump_teacher(
            teacher=Classifier(),
            data=sentences(),
            out=tmp_path / "c",
            device="cpu",
            features=[feature],
            batch_size=batch_size,
            accept=["unsteady"],
        )


def test_frames_of_padding_never_become_rows(tmp_path: Path) -> None:
    class Frames(nn.Module):
        def __init__(self, halve: bool) -> None:
            super().__init__()
            self.net, self.halve = nn.Linear(2, 5), halve

        def forward(self, frames: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.net(frames)[:, :: 2 if self.halve else 1]

    lengths = [2 + i % 5 for i in range(12)]
    data = Listed(
        {"frames": torch.randn(n, 2, generator=torch.Generator().manual_seed(n))} for n in lengths
    )
    report = dump(tmp_path / "c", Frames(False), data)
    assert report.rows_written == sum(lengths)
    for size in (1, 5):
        with pytest.raises(DataError, match=r"let it return row_mask \[B, ") as caught:
            dump_teacher(
                teacher=Frames(True), data=data, out=tmp_path / "d", device="cpu", batch_size=size
            )
        assert "\n" not in str(caught.value)


# ---- one answer to one question
# -------------------------------------------------------------------------------


def test_the_record_with_the_most_padding_is_asked_wherever_it_stands() -> None:
    """The shortest of all that a probe looks at is in the batch, and is the one that is asked
    alone.
    """
    data = sentences(40)
    data[0] = {"input_ids": torch.arange(1, 12)}
    samples = Samples(data)
    shortest, longest = extremes(samples)
    assert len(data[shortest]["input_ids"]) == 3 and longest == 0
    assert telling_records(range(6, 10), [shortest, longest])[-2:] == [shortest, longest]
    shapes: list[tuple[int, ...]] = []

    class Heard(Reader):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Tensor
        ) -> Tensor:
            shapes.append(tuple(input_ids.shape))
            return super().forward(input_ids, attention_mask)

    asked = Question(
        Heard().eval(), CPU, lambda ids: read_batch(samples, [(i, 0) for i in ids]), "next-token"
    )
    found = steadiness(asked, telling_records(range(6, 10), extremes(samples)))
    assert found is not None and found.problem is None and shapes == [(4, 11), (4, 11), (1, 3)]


class LastToken(nn.Module):
    """A classifier that looks for the last token that is not its padding id, and is padded with
    another.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        last_B = torch.where(input_ids != 19, torch.arange(input_ids.shape[1]), 0).amax(1)
        return self.head(self.embed(input_ids)[torch.arange(len(input_ids)), last_B])


def test_a_student_that_looks_at_padding_is_refused_before_its_first_step(tmp_path: Path) -> None:
    data = sentences(vocab=18, labels=lambda i, n: torch.tensor(i % 4))
    options: dict[str, Any] = dict(
        student=LastToken(), data=data, alpha=0.0, max_steps=1, device="cpu"
    )
    with pytest.raises(
        DataError,
        match=r"the student \(LastToken\) answers by what shares its batch.* another padding "
        r"id than 0\?.*--accept unsteady",
    ):
        train_student(**options, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert train_student(**options, out=tmp_path / "r", accept=["unsteady"]).finished
    with pytest.raises(
        DataError, match=r"the teacher \(LastToken\) answers by what shares its batch"
    ):
        dump(tmp_path / "c", LastToken(), data)
    data.pad_token_id = 19  # type: ignore[attr-defined]
    dump(tmp_path / "c", LastToken(), data)
    assert verify(tmp_path / "c", teacher=LastToken(), data=data, device="cpu").ok
    assert train_student(**{**options, "data": data}, out=tmp_path / "s").finished


class Counting(Reader):
    """Learned positions, counted from the first column on, padding or not."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Embedding(16, 8)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Tensor
    ) -> Tensor:
        at = extra.get("position_ids", torch.arange(input_ids.shape[1]).expand_as(input_ids))
        x = self.embed(input_ids) + self.place(at)
        return self.head((x if attention_mask is None else x * attention_mask[..., None]).cumsum(1))


@pytest.mark.parametrize("positions", [False, True])
def test_padding_on_the_left_is_right_or_is_named_as_the_cause(
    tmp_path: Path, positions: bool
) -> None:
    class Left(Listed):
        @staticmethod
        def collate_fn(items: list[Any]) -> Any:
            width = max(len(item["input_ids"]) for item in items)
            gaps = [width - len(item["input_ids"]) for item in items]
            mask = torch.stack([(torch.arange(width) >= gap).long() for gap in gaps])
            ids = torch.stack(
                [
                    nn.functional.pad(item["input_ids"], (gap, 0))
                    for item, gap in zip(items, gaps, strict=True)
                ]
            )
            return {
                "input_ids": ids,
                "attention_mask": mask,
                **({"position_ids": (mask.cumsum(1) - 1).clamp(0)} if positions else {}),
            }

    teacher, data = Counting(), Left(sentences())
    if not positions:
        with pytest.raises(
            DataError, match=r"The batch is padded on the left: .* position_ids too"
        ) as caught:
            dump(tmp_path / "c", teacher, data)
        assert "accept" not in str(caught.value)
        return
    report = dump(tmp_path / "c", teacher, data, values="float32")
    assert report.rows_written == sum(len(item["input_ids"]) - 1 for item in data)
    with kdcache.open(tmp_path / "c") as cache:
        batch = cache.read(np.arange(12))
    alone = torch.cat([teacher(item["input_ids"][None])[0, :-1] for item in data]).detach()
    np.testing.assert_allclose(batch.columns["values"], alone.numpy(), rtol=1e-5, atol=1e-6)


def test_a_4d_mask_is_the_models_own_affair(tmp_path: Path) -> None:
    """[1, L, L] for each item, the usual way to pack: given to the model as it is, and no mask of
    positions.
    """

    class Masked(Reader):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Tensor
        ) -> Tensor:
            assert attention_mask is not None and attention_mask.dim() == 4
            return self.head(attention_mask[:, 0].float() @ self.embed(input_ids))

    data = Listed(
        {"input_ids": torch.arange(1, 7), "attention_mask": torch.ones(6, 6).tril()[None]}
        for _ in range(5)
    )
    assert dump(tmp_path / "c", Masked(), data).rows_written == 25
    with kdcache.open(tmp_path / "c") as cache:
        assert not cache.spec.tokens
