"""Language from end to end, as examples/language does it: text, tokenizer, teacher, cache, student,
perplexity.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import kdcache
from kdcache.data.sources import load_data
from kdcache.errors import IdentityMismatch
from kdcache.student.evaluate import evaluate

EXAMPLE = Path(__file__).parents[1] / "examples" / "language" / "prepare.py"
WINDOW, VOCABULARY = 48, 512


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("prepare", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("language")
    module.prepare(out, files=12, vocabulary=VOCABULARY)
    return out


def text(prepared: Path, split: str = "train", **changed: object) -> dict[str, object]:
    return {
        "data": f"text:{prepared}/corpus/*.py",
        "data_args": {
            "tokenizer": str(prepared / "tokenizer.json"),
            "window": WINDOW,
            "split": split,
            **changed,
        },
    }


def unigram_loss(prepared: Path) -> float:
    """Nats per held-out token of what knows no context: the counts of the training tokens, one
    added to each.
    """
    windows = {
        split: load_data(given["data"], given["data_args"])
        for split, given in ((split, text(prepared, split)) for split in ("train", "eval"))
    }
    ids = {
        split: torch.cat([data[i]["input_ids"][1:] for i in range(len(data))])
        for split, data in windows.items()
    }
    counts = torch.bincount(ids["train"], minlength=VOCABULARY).double() + 1
    return float(-(counts / counts.sum()).log()[ids["eval"]].mean())


@pytest.fixture(scope="module")
def teacher(prepared: Path) -> Path:
    kdcache.train_student(
        student=f"hf-config:{prepared}/teacher",
        out=prepared / "runs" / "teacher",
        alpha=0,
        max_steps=100,
        batch_size=16,
        lr=3e-3,
        device="cpu",
        save_every=10**6,
        **text(prepared),
    )
    return prepared / "runs" / "teacher" / "last"


@pytest.fixture(scope="module")
def cache(prepared: Path, teacher: Path) -> Path:
    kdcache.dump_teacher(
        teacher=f"hf:{teacher}",
        out=prepared / "cache",
        k=16,
        batch_size=8,
        device="cpu",
        **text(prepared),
    )
    return prepared / "cache"


@pytest.mark.slow
def test_the_cache_holds_what_the_teacher_says_about_the_next_token(
    prepared: Path, teacher: Path, cache: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from kdcache.cache.codec import decode_rows

    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    opened = kdcache.open(cache)
    batch = opened.read(np.array([3]))
    tokens = torch.from_numpy(batch.columns["token"].astype(np.int64))
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0].double()
    rows = decode_rows(opened.spec, batch.columns)
    assert batch.columns["label"][:, 0].tolist() == tokens[batch.columns["pos"] + 1].tolist()
    log_p = torch.log_softmax(logits, -1)[batch.columns["pos"]].gather(
        1, torch.from_numpy(rows.ids)
    )
    normaliser = np.logaddexp(
        np.logaddexp.reduce(rows.relative.astype(np.float64), axis=1), rows.tail_lse[:, 0]
    )
    # float16 of logits within 32 of the maximum: half a step is 2^-7; the batch of one adds float32
    # noise.
    assert np.abs(rows.relative - normaliser[:, None] - log_p.numpy()).max() < 2**-6
    document = load_data(**{"spec": text(prepared)["data"], "args": text(prepared)["data_args"]})[3]
    assert document["input_ids"].tolist() == tokens.tolist()


@pytest.mark.slow
def test_a_student_of_the_cache_gets_better_and_opens_in_transformers(
    prepared: Path, cache: Path
) -> None:
    from transformers import AutoModelForCausalLM

    spec = f"hf-config:{prepared}/student"
    held_out = text(prepared, "eval")
    before = evaluate(spec, held_out["data"], data_args=held_out["data_args"], device="cpu")
    report = kdcache.train_student(
        cache=cache,
        student=spec,
        out=prepared / "runs" / "student",
        alpha=0.5,
        lr=1e-2,
        max_steps=200,
        batch_size=16,
        device="cpu",
        save_every=10**6,
        eval_every=10**6,
        eval_data=held_out["data"],
        eval_data_args=held_out["data_args"],
    )
    # random weights: nearly uniform
    assert abs(math.log(before["perplexity"]) - math.log(VOCABULARY)) < 0.1
    assert math.log(report.evaluation["perplexity"]) < unigram_loss(prepared) - 0.1
    student = AutoModelForCausalLM.from_pretrained(prepared / "runs" / "student" / "last").eval()
    window = load_data(held_out["data"], held_out["data_args"])[0]["input_ids"]
    with torch.inference_mode():
        loss = student(window[None], labels=window[None]).loss
    assert math.isfinite(float(loss)) and float(loss) < math.log(VOCABULARY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "field"), [({"window": 32}, "data.window"), ({"split": "all"}, "data.num_samples")]
)
def test_other_windows_are_refused_by_the_fields_that_differ(
    prepared: Path, cache: Path, tmp_path: Path, changed: dict[str, object], field: str
) -> None:
    with pytest.raises(IdentityMismatch) as caught:
        kdcache.train_student(
            cache=cache,
            student=f"hf-config:{prepared}/student",
            out=tmp_path / "run",
            max_steps=1,
            device="cpu",
            **text(prepared, **changed),
        )
    assert field in {difference.field for difference in caught.value.fields}
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_tokenizer_is_refused(prepared: Path, cache: Path, tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    other = ByteLevelBPETokenizer()
    other.train(
        [str(next((prepared / "corpus").glob("*.py")))], vocab_size=VOCABULARY, show_progress=False
    )
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(IdentityMismatch) as caught:
        kdcache.train_student(
            cache=cache,
            student=f"hf-config:{prepared}/student",
            out=tmp_path / "run",
            max_steps=1,
            device="cpu",
            **text(prepared, tokenizer=str(tmp_path / "tokenizer.json")),
        )
    assert "tokenizer.fingerprint" in {difference.field for difference in caught.value.fields}
