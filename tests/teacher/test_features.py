"""Features in a cache, against hooks of one's own and plain formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_world import Points, Sentences, Speaker, mlp
from torch import nn

import kdcache
from kdcache.cache.features import decode_feature
from kdcache.errors import DataError, NotBuilt, UsageError
from kdcache.teacher.dump import dump_teacher
from kdcache.teacher.hooks import FeatureHooks, FeatureRequest, parse_feature, parse_features


class Pixels:
    """Images of 4 x 4 pixels in two channels."""

    name = "pixels"

    def __init__(self) -> None:
        self.x = torch.randn(9, 2, 4, 4, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], i % 3


class Seer(nn.Module):
    """A convolution with an in-place activation behind it, then a patch encoder with one class
    token.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.conv = nn.Conv2d(2, 5, 3, padding=1)
            self.act = nn.ReLU(inplace=True)
            self.Tokens = nn.Linear(5, 6)
            self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x)).flatten(2).transpose(1, 2)
        x = self.Tokens(torch.cat([x.mean(1, keepdim=True), x], 1))
        return self.head(x[:, 0])


def cached(path: Path) -> dict[str, np.ndarray]:
    with kdcache.open(path) as cache:
        batch = cache.read(np.arange(cache.num_records))
        return {f.name: decode_feature(f, batch.columns) for f in cache.spec.features}


def test_every_recipe_of_images_is_what_its_formula_says(tmp_path: Path) -> None:
    seer, data = Seer().eval(), Pixels()
    wanted = [
        "conv:raw:float32",
        "conv:map:float32",
        "conv:pool:float32",
        "conv:energy:float32",
        "Tokens:cls:float32",
        "Tokens:map:float32",
        "Tokens:last:float32",
        "Tokens:pool:float32",
        "head",
    ]
    dump_teacher(
        teacher=seer, data=data, out=tmp_path / "c", features=wanted, batch_size=9, device="cpu"
    )
    with torch.inference_mode():
        conv = seer.conv(data.x)
        flat = conv.relu().flatten(2).transpose(1, 2)
        tokens = seer.Tokens(torch.cat([flat.mean(1, keepdim=True), flat], 1))
        expected = {
            "conv_raw": conv,
            "conv_map": conv,
            "conv_pool": conv.mean((2, 3)),
            "conv_energy": (conv * conv).mean(1),
            "tokens_cls": tokens[:, 0],
            "tokens_last": tokens[:, -1],
            "tokens_pool": tokens.mean(1),
            "tokens_map": tokens[:, 1:].transpose(1, 2).reshape(9, 6, 4, 4),
            "head_raw": seer.head(tokens[:, 0]).half(),
        }
    found = cached(tmp_path / "c")
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values.float().numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", None)]
)
def test_every_dtype_keeps_what_it_can(tmp_path: Path, dtype: str, bound: float | None) -> None:
    net, data = mlp(), Points(20)
    dump_teacher(
        teacher=net,
        data=data,
        out=tmp_path / "c",
        kind="none",
        features=[f"0:raw:{dtype}"],
        device="cpu",
    )
    with torch.inference_mode():
        expected = net[0](data.x).numpy().astype(np.float64)
    allowed = (
        np.abs(expected).max(1, keepdims=True) / 254 * 1.0001
        if bound is None
        else np.abs(expected) * bound
    )
    assert (np.abs(cached(tmp_path / "c")["0_raw"] - expected) <= allowed).all()


def test_raw_of_sequences_is_kept_at_the_rows_and_pools_know_the_padding(tmp_path: Path) -> None:
    net, data = Speaker(), Sentences()
    dump_teacher(
        teacher=net,
        data=data,
        out=tmp_path / "c",
        kind="topk",
        k=4,
        batch_size=5,
        device="cpu",
        features=["embed:raw:float32", "embed:pool:float32", "embed:last:float32"],
    )
    with kdcache.open(tmp_path / "c") as cache:
        batch = cache.read(np.arange(len(data)))
        offsets, pos = batch.offsets["row"], batch.columns["pos"]
    found = cached(tmp_path / "c")
    for i, item in enumerate(data.items):
        with torch.inference_mode():
            x = net.embed(item["input_ids"]).numpy()
        rows = slice(offsets[i], offsets[i + 1])
        np.testing.assert_array_equal(found["embed_raw"][rows], x[pos[rows]])
        np.testing.assert_array_equal(found["embed_last"][i], x[-1])
        np.testing.assert_allclose(found["embed_pool"][i], x.mean(0), rtol=1e-5, atol=1e-6)


def test_a_module_that_is_not_there_is_refused_with_near_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no module 'Tokenz'.*'Tokens'"):
        dump_teacher(
            teacher=Seer(), data=Pixels(), out=tmp_path / "c", features=["Tokenz"], device="cpu"
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:poool", "recipe 'poool' is unknown.*'pool'"),
        ("a:raw:float61", "dtype 'float61' is unknown.*float16"),
        ("", "expected MODULE"),
        ("a:raw:int8:x", "expected MODULE"),
        (":raw", "expected MODULE"),
        ("a::int8", "expected MODULE"),
    ],
)
def test_a_wrong_feature_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_feature(text)


def test_parsing_and_names() -> None:
    assert parse_feature("blocks.3.Norm-1:pool:int8") == FeatureRequest(
        "blocks.3.Norm-1", "pool", "int8"
    )
    assert parse_feature("blocks.3.Norm-1").name == "blocks_3_norm_1_raw"
    assert len(FeatureRequest("x." * 60 + "end", "last").name) == 64
    with pytest.raises(NotBuilt, match="gram"):
        parse_feature("a:gram")
    with pytest.raises(UsageError, match="'a_raw'"):
        parse_features(["a", "a:raw:int8"])


def test_recipes_that_do_not_fit_modules_that_do_not_run_and_those_that_run_twice(
    tmp_path: Path,
) -> None:
    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](self[1](self[0](x)) + self[1](x.sum(1, keepdim=True)))

    for teacher, feature, said in (
        (mlp(), "0:map", "0_map of module '0'.*expected"),
        (Twice(*mlp()), "1", "more than once"),
        (nn.ModuleDict({"net": mlp(), "idle": nn.Linear(1, 1)}), "idle", "did not run"),
    ):
        if isinstance(teacher, nn.ModuleDict):
            teacher.forward = teacher["net"].forward  # type: ignore[method-assign]
        with pytest.raises(UsageError, match=said):
            dump_teacher(
                teacher=teacher,
                data=Points(9),
                out=tmp_path / "c",
                features=[feature],
                device="cpu",
            )


def test_an_activation_that_its_dtype_cannot_hold_names_record_and_feature(tmp_path: Path) -> None:
    data = Points(20)
    data.x[13] *= 1e6
    with pytest.raises(DataError, match=r"record 13: feature 0_raw of module '0'.*float16"):
        dump_teacher(teacher=mlp(), data=data, out=tmp_path / "c", features=["0"], device="cpu")


def test_hooks_are_gone_afterwards() -> None:
    net = mlp()
    with FeatureHooks(net, (FeatureRequest("0"),)):
        assert len(net[0]._forward_hooks) == 1
    assert not net[0]._forward_hooks


def test_a_plan_with_features_asks_the_teacher_once(tmp_path: Path) -> None:
    """`raw` of sequences is kept by row, which is known only after the pass that gave it."""
    told: dict[str, int] = {}
    for name, features in {"without": (), "with": ("embed", "embed:pool")}.items():
        teacher, passes = Speaker(), []
        teacher.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        dump_teacher(
            teacher=teacher,
            data=Sentences(),
            out=tmp_path / name,
            rows="next-token",
            features=features,
            dry_run=True,
            device="cpu",
        )
        told[name] = len(passes)
    assert told == {"without": 1, "with": 1}
