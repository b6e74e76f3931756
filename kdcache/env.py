"""What this installation consists of, for bug reports and for the lines that benchmarks end with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import kdcache

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pyarrow",
    "h5py",
    "xxhash",
    "safetensors",
    "click",
    "transformers",
    "tokenizers",
    "timm",
    "torchvision",
    "scikit-learn",
    "matplotlib",
)


def env() -> dict[str, Any]:
    """Versions of Python, kdcache and the libraries it uses (None: not installed), CPUs, GPUs, the
    engine in use.

    Keys: kdcache, python, platform, cpus (that this process may use), packages, gpus (names),
    torch_threads, cuda (version torch was built for, or None), engine (what `--engine auto` runs),
    device (where).
    """
    import torch

    from kdcache.loss.engines import check_engine

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {
        "kdcache": kdcache.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "engine": check_engine("auto", torch.device("cuda" if cuda else "cpu")),
        "device": "cuda" if cuda else "cpu",
    }


def version(package: str) -> str | None:
    """The installed version of a package, None when there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(found: dict[str, Any]) -> str:
    """The result of `env` for people."""
    rows = [
        ("kdcache", found["kdcache"]),
        ("python", found["python"]),
        ("platform", found["platform"]),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        ("CPUs", f"{found['cpus']}, torch uses {found['torch_threads']} threads"),
        ("GPUs", ", ".join(found["gpus"]) or "none"),
        ("CUDA of torch", found["cuda"] or "none"),
        ("engine", f"{found['engine']} (on {found['device']})"),
    ]
    return "\n".join(f"{name:<14}  {value}" for name, value in rows)
