"""A teacher's own tokenizer and the data's; its positions and the data's windows; how many bytes
text will take.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_world import Dump, Sentences, Speaker, dumper
from text_world import WORDS, llama, tokenizer_file

import kdcache
from kdcache.data.sources import load_data
from kdcache.data.text import fingerprint, load_tokenizer
from kdcache.errors import DataError, IdentityMismatch, UsageError
from kdcache.models.checks import require_tokenizer
from kdcache.models.model import Model, as_model, load_model
from kdcache.models.specs import own_tokenizer, position_limit

transformers = pytest.importorskip("transformers")


def gpt2(folder: Path, positions: int = 64) -> Path:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=positions, n_embd=8, n_layer=1, n_head=2
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    """Documents of 5 to 44 words, as the data options of a dump."""
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(
            " ".join((WORDS * 3)[i:][: 5 + 3 * i + 6 * (i % 2)])
        )
    file = tokenizer_file(tmp_path / "tokenizer.json", WORDS)
    return {
        "data": f"text:{tmp_path}/text/*.txt",
        "data_args": {"tokenizer": str(file), "window": 16},
        "k": 4,
    }


@pytest.fixture
def dump(tmp_path: Path) -> Dump:
    return dumper(tmp_path / "c")


def test_another_tokenizer_beside_the_teacher_is_refused_by_name(
    tmp_path: Path, dump: Dump, text: dict[str, Any]
) -> None:
    folder = gpt2(tmp_path / "teach")
    other = tokenizer_file(folder / "tokenizer.json", WORDS[::-1])
    with pytest.raises(
        IdentityMismatch, match=r"tokenizer\.fingerprint.*\n.*teach/tokenizer\.json"
    ) as caught:
        dump(teacher=f"hf:{folder}", **text)
    assert [d.field for d in caught.value.fields] == ["tokenizer.fingerprint"] and not (
        tmp_path / "c"
    ).exists()
    assert "--accept tokenizer" in str(caught.value)
    assert dump(teacher=f"hf:{folder}", **text, accept=["tokenizer"]).complete
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.recorded["accepted"] == "tokenizer"
        assert cache.identity.tokenizer is not None
        assert cache.identity.tokenizer["fingerprint"] != fingerprint(load_tokenizer(str(other)))


def test_the_same_tokenizer_in_another_form_is_the_same(
    tmp_path: Path, dump: Dump, text: dict[str, Any]
) -> None:
    folder = gpt2(tmp_path / "teach")
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["truncation"] = {
        "direction": "Right",
        "max_length": 9,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(dict(reversed(document.items())), indent=3))
    assert dump(teacher=f"hf:{folder}", **text).complete


def test_a_run_says_what_its_weights_were_trained_on(tmp_path: Path, text: dict[str, Any]) -> None:
    folder = gpt2(tmp_path / "run" / "best")
    assert own_tokenizer(folder) is None
    data = load_data(text["data"], text["data_args"])
    wanted = data.tokenizer_identity["fingerprint"]
    (tmp_path / "run" / "run.toml").write_text(
        f'[train-student]\n[recorded]\ntokenizer = "{wanted}"\n'
    )
    assert own_tokenizer(folder) == (wanted, tmp_path / "run" / "run.toml")
    model = load_model(f"hf:{folder}")
    assert require_tokenizer(model, data.tokenizer_identity, role="student") == []
    with pytest.raises(IdentityMismatch, match=r"the student hf:.* is for another tokenizer"):
        require_tokenizer(model, {"fingerprint": "0"}, role="student")
    # came along with the weights it began from
    tokenizer_file(folder / "tokenizer.json", WORDS[::-1])
    assert own_tokenizer(folder) == (wanted, tmp_path / "run" / "run.toml")
    (folder / "tokenizer.json").unlink()
    for text_of_run in ("", "[recorded]\ntokenizer = 3\n", "recorded = 3\n", "[["):
        (tmp_path / "run" / "run.toml").write_text(text_of_run)
        assert own_tokenizer(folder) is None
    assert require_tokenizer(model, None, role="student") == []


# ---- positions


def test_windows_beyond_a_learned_table_are_refused_and_beyond_rotary_ones_warned_of(
    tmp_path: Path, dump: Dump, text: dict[str, Any]
) -> None:
    said = r"made for 8 positions \(max_position_embeddings\), the data has sequences of up to 16 tokens"
    with pytest.raises(UsageError, match=said + ": take windows of at most 8"):
        dump(teacher=f"hf:{gpt2(tmp_path / 'learned', 8)}", **text)
    told: list[str] = []
    report = dump(
        teacher=f"hf:{llama(tmp_path / 'rotary', 40, positions=8)}", **text, say=told.append
    )
    assert [code for code, _ in report.warnings] == ["beyond-positions"] and report.complete
    assert any(line.startswith("warning: ") and "extrapolated" in line for line in told)
    assert (
        dump(teacher=f"hf:{gpt2(tmp_path / 'long', 16)}", **text, out=tmp_path / "d").warnings == ()
    )


def test_how_many_positions_a_model_has() -> None:
    tiny = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(**tiny, ffn_dim=8, max_position_embeddings=32, word_embed_proj_dim=8)
    )
    rotary = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**tiny, intermediate_size=8, max_position_embeddings=32)
    )
    assert (position_limit(opt), position_limit(rotary)) == ((32, True), (32, False))
    assert position_limit(Speaker()) is None


def test_a_teacher_that_fails_is_one_line_with_what_it_was_given(
    tmp_path: Path, dump: Dump
) -> None:
    class Loud(Sentences):
        """Sample 20 has a token that the teacher has no row for; no probe of 8 of 23 samples meets
        it.
        """

        def __getitem__(self, i: int) -> Any:
            item = super().__getitem__(i)
            return (
                item if i != 20 else {**item, "input_ids": torch.full_like(item["input_ids"], 77)}
            )

    with pytest.raises(
        DataError,
        match=r"^samples 20 to 22, view 0: the teacher \(Speaker\) cannot be run on "
        r"input_ids \[3, 4\] of int64, .*: IndexError: .*world\.py, line \d+\)$",
    ):
        dump(teacher=Speaker(), data=Loud(), batch_size=4, k=3)


# ---- bytes


def test_the_bytes_of_text_are_predicted_to_the_byte(
    tmp_path: Path, dump: Dump, text: dict[str, Any]
) -> None:
    """Every record is rounded up to a whole byte, so that the whole is at most a byte a record
    more.
    """
    report = dump(teacher=f"hf:{gpt2(tmp_path / 'teach')}", **text, records_per_shard=100)
    data = load_data(text["data"], text["data_args"])
    lengths = np.array([len(data[i]["input_ids"]) for i in range(len(data))])
    np.testing.assert_array_equal(data.token_lengths, lengths)
    assert len(set(lengths.tolist())) > 3
    # Offsets have one entry more than records, 8 bytes in each of the two ragged levels.
    assert 0 <= report.predicted_bytes - report.bytes + 16 <= report.num_records


def test_a_dataset_that_does_not_know_its_lengths_is_asked_for_as_many_as_an_identity_probes(
    dump: Dump,
) -> None:
    report = dump(teacher=Speaker(), data=Sentences(200), k=5, records_per_shard=1000)
    # Rows are taken from the lengths by what the probe's records miss: here two positions of every
    # fourth, not one.
    assert report.predicted_bytes == pytest.approx(report.bytes, rel=0.05)


def test_a_model_keeps_its_folder_where_it_is_given_again(tmp_path: Path) -> None:
    model = load_model(f"hf:{gpt2(tmp_path / 'teach')}")
    assert model.folder == tmp_path / "teach"
    assert as_model(model, role="teacher").folder == model.folder
    assert Model(Speaker(), "", "", None, "", None).folder is None
