"""Which problems the kernel tests solve: the factors, one combination of them, and few that cover
every pair.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

FACTORS: dict[str, tuple[Any, ...]] = {
    "temperature": (2.0, 1.0, 0.5, 1.5, 3.0, 4.0, 1.37),
    "kept": (8, 64, 1, 100),
    "num_classes": (123, 1271, 7, 1272, 32000),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "labels": ("out", "in", "some", "two", "twice", "none", "ignored"),
    "tail_mass": (None, 0.0, 1e-9, 0.5, 1.0),
    "logits": ("normal", "apart", "constant", "minus_inf", "offset"),
    "layout": ("plain", "strided", "padded", "odd"),
    "rows": (3, 1, 0),
    "grad_output": ("one", "half", "each"),
    "inplace": (False, True),
    "weights": (None, "some"),
    "tail": ("bucket", "renormalise", "conditional", "sampled", "uniform"),
    "divergence": ("forward_kl", "reverse_kl", "jsd", "tv"),
    "softcap": (None, 5.0, 30.0),
    "logit_scale": (1.0, 0.3),
}


@dataclass(frozen=True)
class Case:
    """One combination of FACTORS, or of others: labels "alike" have no weights; the defaults are
    the usual.
    """

    temperature: float = 2.0
    kept: int = 8
    num_classes: int = 123
    dtype: torch.dtype = torch.float32
    labels: str = "out"
    tail_mass: float | None = None
    logits: str = "normal"
    layout: str = "plain"
    rows: int = 3
    grad_output: str = "one"
    inplace: bool = False
    weights: str | None = None
    tail: str = "bucket"
    divergence: str = "forward_kl"
    softcap: float | None = None
    logit_scale: float = 1.0
    # classes, the last ones, that the student has and the teacher has not
    beyond: int = 0

    def __str__(self) -> str:
        usual = Case()
        beyond = [f"beyond{self.beyond}"] if self.beyond else []
        return "-".join(
            [
                f"{getattr(self, name)}"
                for name in FACTORS
                if getattr(self, name) != getattr(usual, name)
            ]
            + beyond
        )

    @property
    def taught(self) -> int:
        """The classes of the teacher."""
        return self.num_classes - self.beyond

    @property
    def sensible(self) -> bool:
        """Whether the float64 definition has a finite value and gradient."""
        if (
            self.divergence == "reverse_kl"
            and self.tail != "conditional"
            and self.beyond
            and self.kept >= self.taught
        ):
            # the teacher gives nothing to a tail in which the student has classes of its own
            return False
        if self.divergence == "reverse_kl":
            return self.tail in ("bucket", "conditional") and self.tail_mass not in (0.0, 1.0)
        if self.tail == "uniform" and self.logits == "minus_inf" and self.tail_mass != 0.0:
            return False
        # All mass in the tail leaves nothing to renormalise; weights of any sum are no distribution
        # to compare.
        return not (self.tail_mass == 1.0 and self.tail not in ("bucket", "uniform")) and not (
            self.tail in ("sampled", "uniform") and self.divergence != "forward_kl"
        )


def covering(seed: int = 0) -> list[Case]:
    """Few cases in which every pair of values of two factors occurs somewhere (where it is
    sensible).
    """
    chance = random.Random(seed)
    wanted = {
        ((a, x), (b, y))
        for a, b in combinations(FACTORS, 2)
        for x in FACTORS[a]
        for y in FACTORS[b]
    }
    cases: list[Case] = []
    while wanted:
        best, gain = None, 0
        for _ in range(60):
            case = Case(**{name: chance.choice(values) for name, values in FACTORS.items()})
            found = len(pairs_of(case) & wanted) if case.sensible else 0
            if found > gain:
                best, gain = case, found
        # what is left is covered one pair at a time, or cannot be
        if best is None or gain < 4:
            break
        cases.append(best)
        wanted -= pairs_of(best)
    for pair in sorted(wanted, key=str):
        if pair in wanted and (case := replace(Case(), **dict(pair))).sensible:
            cases.append(case)
            wanted -= pairs_of(case)
    return cases


def pairs_of(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return {((a, getattr(case, a)), (b, getattr(case, b))) for a, b in combinations(FACTORS, 2)}
