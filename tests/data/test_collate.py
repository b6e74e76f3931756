"""Batches against the items they were made of; rows against a position-by-position definition and
HF's own loss.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.data.collate import collate
from kdcache.data.padding import Real
from kdcache.data.row_selection import (
    next_token_rows,
    position_rows,
    record_labels,
    select_rows,
)
from kdcache.data.samples import Samples
from kdcache.data.transfer import to_device
from kdcache.errors import DataError


def items_of(raw, **attributes):
    """Items of a list, and the samples of the dataset (with `attributes`) that they came from."""
    made = type("Listed", (list,), attributes)(raw)
    samples = Samples(made)
    return [samples.item(i) for i in range(len(raw))], samples


def batch_of(raw, **attributes):
    return collate(*items_of(raw, **attributes))


def test_tensors_are_stacked():
    xs = torch.arange(12.0).reshape(3, 2, 2)
    batch = batch_of([(x, y) for x, y in zip(xs, (4, 5, 6), strict=True)])
    assert torch.equal(batch.inputs, xs) and batch.labels.tolist() == [4, 5, 6] and len(batch) == 3
    items, _ = items_of([(x, y) for x, y in zip(xs, (4, 5, 6), strict=True)])
    assert batch.sample_key.dtype == np.uint64 and batch.sample_key.tolist() == [
        item.sample_key for item in items
    ]
    assert (
        batch.view_key is None
        and batch.lengths is None
        and batch.tokens == []
        and batch.document_starts == []
    )
    two = batch_of([{"x": x, "labels": [1, 2], "label_weight": [0.25, 0.75]} for x in xs])
    assert two.labels.shape == (3, 2) and two.label_weight.tolist() == [[0.25, 0.75]] * 3
    assert batch_of([(x, None) for x in xs]).labels is None
    keyed = batch_of(list(zip(xs, range(3), strict=True)), key=lambda self, i: i)
    assert keyed.sample_key.tolist() == [0, 1, 2] and keyed.view_key.dtype == np.uint64


def test_sequences_are_padded_and_their_lengths_kept():
    batch = batch_of(
        [
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "document_start": [1, 0, 0]},
            {"input_ids": [8, 9], "labels": [-100, 9], "document_start": [0, 1]},
        ]
    )
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs.keys() == {"input_ids", "attention_mask"}
    assert batch.labels.tolist() == [[5, 6, 7], [-100, 9, -100]]
    assert (
        batch.document_start.tolist() == [[1, 0, 0], [0, 1, 0]]
        and batch.document_start.dtype == torch.uint8
    )
    assert batch.lengths.tolist() == [3, 2] and [t.tolist() for t in batch.tokens] == [
        [5, 6, 7],
        [8, 9],
    ]
    assert [t.tolist() for t in batch.document_starts] == [[1, 0, 0], [0, 1]]
    frames = batch_of([{"frames": torch.ones(2, 3)}, {"frames": torch.ones(4, 3)}])
    assert frames.inputs["frames"].sum((1, 2)).tolist() == [6, 12] and frames.inputs[
        "frames"
    ].shape == (2, 4, 3)
    assert frames.inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert to_device(batch.inputs, torch.device("cpu"))["input_ids"] is batch.inputs["input_ids"]


def test_a_record_is_trimmed_to_its_own_positions_on_every_axis_of_them():
    """Also a mask of pairs of positions, with an axis of heads before it."""
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    real, pairs = Real({"attention_mask": mask}), torch.arange(2 * 3 * 16).reshape(2, 3, 4, 4)
    assert torch.equal(real.trim(pairs, 0), pairs[0, :, :2, :2])
    assert torch.equal(real.trim(pairs, 1), pairs[1, :, 1:, 1:])
    assert torch.equal(real.trim(pairs[:, 0, 0], 1), pairs[1, 0, 0, 1:])


def test_equal_lengths_need_no_attention_mask():
    assert batch_of([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]).inputs.keys() == {"input_ids"}
    given_mask = batch_of(
        [
            {"input_ids": [1, 0], "attention_mask": [1, 0]},
            {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1]},
        ]
    )
    assert given_mask.inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            [(torch.zeros(2), 0), (torch.zeros(3), 0)],
            r"shapes \[\(2,\), \(3,\)\]; expected one shape",
        ),
        ([(torch.zeros(2), 0), {"x": torch.zeros(2)}], "shapes"),
        ([{"x": [1]}, {"y": [1]}], "different fields"),
        ([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}], "'x' has the shapes"),
        ([(torch.zeros(2), 0), (torch.zeros(2), None)], "1 of 2 items of a batch have no label"),
        ([(torch.zeros(2), 0), (torch.zeros(2), [1, 2])], "'label' has the shapes"),
    ],
)
def test_items_that_do_not_fit_together(raw, message):
    with pytest.raises(DataError, match=message):
        batch_of(raw)
    with pytest.raises(DataError, match="no items"):
        collate([])


def test_a_collate_fn_gets_the_items_as_they_were_and_its_answer_is_read_as_an_item():
    def words(self, items):
        return {
            "input_ids": torch.tensor([[len(item["text"])] * 2 for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }

    raw = [{"text": "a", "labels": 3}, {"text": "bcd", "labels": 4}]
    batch = batch_of(raw, collate_fn=words)
    assert batch.inputs["input_ids"].tolist() == [[1, 1], [3, 3]] and batch.labels.tolist() == [
        3,
        4,
    ]
    pairs = batch_of(
        [(1.0, 2), (3.0, 4)], collate_fn=lambda self, items: torch.utils.data.default_collate(items)
    )
    assert pairs.inputs.tolist() == [1, 3] and pairs.labels.tolist() == [2, 4]
    with pytest.raises(
        DataError, match=r"collate_fn of Listed: 'input' has the shape \(1, 2\) for 2 items"
    ):
        batch_of(
            [(1.0, 2), (3.0, 4)],
            collate_fn=lambda self, items: (torch.zeros(1, 2), torch.zeros(2, dtype=int)),
        )
    with pytest.raises(DataError, match="collate_fn of Listed: an item is a Tensor"):
        batch_of([(1.0, 2)], collate_fn=lambda self, items: torch.zeros(1))
    padded = batch_of(
        [{"input_ids": [1, 2]}, {"input_ids": [3]}],
        collate_fn=lambda self, items: {"input_ids": torch.tensor([[1, 2], [3, 99]])},
    )
    assert padded.lengths.tolist() == [2, 1] and padded.inputs["attention_mask"].tolist() == [
        [1, 1],
        [1, 0],
    ]


sequences = st.integers(1, 6).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            "input_ids": st.lists(st.integers(0, 9), min_size=n, max_size=n),
            "labels": st.lists(st.sampled_from([-100, 1, 2]), min_size=n, max_size=n),
            "document_start": st.lists(st.integers(0, 1), min_size=n, max_size=n),
        }
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_next_token_rows_position_by_position(raw, with_labels, with_starts):
    keep = (
        {"input_ids"}
        | ({"labels"} if with_labels else set())
        | ({"document_start"} if with_starts else set())
    )
    raw = [{name: value for name, value in item.items() if name in keep} for item in raw]
    rows = next_token_rows(batch_of(raw))
    expected = []
    for b, item in enumerate(raw):
        for p in range(len(item["input_ids"]) - 1):
            target = item.get("labels", item["input_ids"])[p + 1]
            if target != -100 and not item.get("document_start", [0] * 9)[p + 1]:
                expected.append((b, p, target))
    found = [(b, p, int(rows.labels_BL[b, p])) for b, p in rows.mask_BL.nonzero().tolist()]
    assert found == expected
    assert (rows.labels_BL[~rows.mask_BL] == -100).all()
    assert rows.positions_N.tolist() == [p for _, p, _ in expected]
    assert rows.labels_N.tolist() == [target for _, _, target in expected]
    assert rows.counts_B.tolist() == [
        sum(b == at for at, _, _ in expected) for b in range(len(raw))
    ]


def test_next_token_rows_mean_what_transformers_means():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    batch = batch_of(
        [
            {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
            {"input_ids": [5, 6], "labels": [5, 6]},
        ]
    )
    with torch.inference_mode():
        answer = model(**batch.inputs, labels=batch.labels)
    rows = next_token_rows(batch)
    loss = torch.nn.functional.cross_entropy(answer.logits[rows.mask_BL], rows.labels_N)
    torch.testing.assert_close(loss, answer.loss)


def test_rows_leave_out_what_is_masked():
    batch = batch_of([{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]}])
    assert next_token_rows(batch).mask_BL.tolist() == [[True, False, False]]
    batch = batch_of([{"input_ids": [1, 2, 3]}])
    assert next_token_rows(batch, torch.tensor([[0, 1, 1]])).mask_BL.tolist() == [
        [False, True, False]
    ]
    with pytest.raises(DataError, match=r"row_mask has the shape \(1, 2\); expected \(1, 3\)"):
        next_token_rows(batch, torch.tensor([[0, 1]]))
    with pytest.raises(DataError, match="labels have the shape"):
        next_token_rows(batch_of([{"input_ids": [1, 2, 3], "labels": 1}]))
    with pytest.raises(DataError, match="integer input_ids"):
        next_token_rows(batch_of([(torch.zeros(3), 1)]))
    with pytest.raises(DataError, match="expected integers"):
        next_token_rows(batch_of([{"input_ids": [1.0, 2.0]}]))


def test_position_rows_are_not_shifted():
    labels = torch.tensor([[4, -100, 5], [6, 7, -100]])
    batch = batch_of([{"x": torch.ones(3), "labels": label} for label in labels])
    rows = position_rows(batch, 3)
    assert rows.mask_BL.tolist() == [[True, False, True], [True, True, False]] and torch.equal(
        rows.labels_BL, labels
    )
    masked = position_rows(batch, 3, torch.tensor([[1, 1, 0], [0, 1, 1]]))
    # also rows with no label
    assert masked.mask_BL.tolist() == [[True, True, False], [False, True, True]]
    assert masked.labels_BL.tolist() == [[4, -100, -100], [-100, 7, -100]]
    every = position_rows(batch_of([{"x": torch.ones(3)}] * 2), 5)
    assert every.mask_BL.all() and every.mask_BL.shape == (2, 5) and (every.labels_BL == -100).all()
    with pytest.raises(DataError, match=r"labels have the shape \(2, 3\); .* needs \(2, 4\)"):
        position_rows(batch, 4)


def test_padding_is_never_a_row():
    """By the batch's own mask; where nothing says which positions of another length are real, it is
    refused.
    """
    frames = batch_of([{"x": torch.ones(2, 3)}, {"x": torch.ones(4, 3)}])
    assert position_rows(frames, 4).counts_B.tolist() == [2, 4]
    assert position_rows(frames, 2, torch.tensor([[1, 0], [1, 1]])).counts_B.tolist() == [1, 2]
    with pytest.raises(
        DataError, match=r"2 positions of records that were padded, .* return row_mask \[B, 2\]"
    ):
        position_rows(frames, 2)


def test_select_rows_goes_by_the_convention():
    tokens, frames = (
        batch_of([{"input_ids": [1, 2, 3]}]),
        batch_of([{"x": [[1.0], [2.0]], "labels": [1, 2]}]),
    )
    assert select_rows(tokens, (1, 9), "record") is None
    assert select_rows(tokens, (1, 3, 9), "next-token").mask_BL.tolist() == [[True, True, False]]
    assert select_rows(tokens, (1, 3, 9), "position").mask_BL.tolist() == [[True, True, True]]
    assert select_rows(tokens, (1, 3, 9), "next-token", num_classes=3).mask_BL.tolist() == [
        [True, False, False]
    ]
    assert select_rows(frames, (1, 2, 9), "position").labels_BL.tolist() == [[1, 2]]
    for shape, convention in (((1, 9), "position"), ((1, 3, 9), "record")):
        with pytest.raises(DataError, match=f"where rows are by {convention}"):
            select_rows(tokens, shape, convention)
    with pytest.raises(
        DataError, match=r"logits for \(records, positions\) \(1, 4\); its input_ids are \(1, 3\)"
    ):
        select_rows(tokens, (1, 4, 9), "next-token")


def test_a_record_has_up_to_16_labels() -> None:
    """As docs/format.md 3.1 counts them: 17 are refused."""
    labels = torch.arange(32).reshape(2, 16)
    found, weight = record_labels(labels, None, 40)
    assert found is not None and torch.equal(found, labels) and weight is None
    with pytest.raises(DataError, match="expected one class index a record, or up to 16"):
        record_labels(torch.zeros(2, 17, dtype=torch.int64), None, 40)
