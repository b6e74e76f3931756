"""Knowledge distillation from a cached teacher: run the teacher once, train many students from what
it said.

Public names load on first use, so that `import kdcache` costs nothing and a cache is read without
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CacheSpec",
    "FeatureSpec",
    "Identity",
    "KDCacheError",
    "Loader",
    "create",
    "dump_teacher",
    "kd_linear_loss",
    "kd_linear_loss_parts",
    "kd_loss",
    "kd_loss_parts",
    "open",
    "row_counts",
    "row_statistics",
    "soft_targets",
    "targets_from_logits",
    "train_student",
]

if TYPE_CHECKING:
    from kdcache.cache.identity import Identity as Identity
    from kdcache.cache.reader import open as open
    from kdcache.cache.spec import CacheSpec as CacheSpec
    from kdcache.cache.spec import FeatureSpec as FeatureSpec
    from kdcache.cache.writer import create as create
    from kdcache.errors import KDCacheError as KDCacheError
    from kdcache.loss.kd_linear_loss import kd_linear_loss as kd_linear_loss
    from kdcache.loss.kd_linear_loss import kd_linear_loss_parts as kd_linear_loss_parts
    from kdcache.loss.kd_loss import kd_loss as kd_loss
    from kdcache.loss.kd_loss import kd_loss_parts as kd_loss_parts
    from kdcache.loss.kd_loss import row_counts as row_counts
    from kdcache.loss.row_statistics import row_statistics as row_statistics
    from kdcache.loss.targets import soft_targets as soft_targets
    from kdcache.loss.targets import targets_from_logits as targets_from_logits
    from kdcache.student.loader import Loader as Loader
    from kdcache.student.train import train_student as train_student
    from kdcache.teacher.dump import dump_teacher as dump_teacher

_WHERE = {
    "KDCacheError": "errors",
    "CacheSpec": "cache.spec",
    "FeatureSpec": "cache.spec",
    "Identity": "cache.identity",
    "open": "cache.reader",
    "create": "cache.writer",
    "soft_targets": "loss.targets",
    "targets_from_logits": "loss.targets",
    "kd_loss": "loss.kd_loss",
    "kd_loss_parts": "loss.kd_loss",
    "kd_linear_loss": "loss.kd_linear_loss",
    "kd_linear_loss_parts": "loss.kd_linear_loss",
    "row_counts": "loss.kd_loss",
    "row_statistics": "loss.row_statistics",
    "Loader": "student.loader",
    "dump_teacher": "teacher.dump",
    "train_student": "student.train",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kdcache.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
