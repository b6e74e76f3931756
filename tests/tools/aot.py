"""Compiles kernels ahead of time, without a driver, and reads what came out: registers, spills,
loops, accesses.

Run as a program it reads a JSON list of requests on standard input and prints one JSON report per
line:
`{"name", "kernel": "module:function", "arch", "signature", "constants", "aligned", "warps"}`. It
runs as a program of its own because triton decides once, when it is imported, whether it compiles
or interprets.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Loop:
    """A main loop in SASS, or a whole kernel. Counts are per thread and pass; an element is one of
    a 128-bit load.
    """

    instructions: int
    exponentials: int
    vector_loads: int
    scalar_loads: int
    vector_stores: int
    scalar_stores: int
    barriers: int


@dataclass(frozen=True)
class Report:
    name: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    loops: list[Loop]
    whole: Loop


def compile_kernel(request: dict[str, Any]) -> Report:
    """Compiles one request and reads its SASS."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = request["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), function)
    constants = request["constants"]
    signature = {
        name: "constexpr" if name in constants else request["signature"][name]
        for name in kernel.arg_names
    }
    attrs = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in request["aligned"]
    }
    source = ASTSource(kernel, signature, constants, attrs)
    options = {"num_warps": request["warps"], "num_stages": 1}
    options |= {"maxnreg": request["maxnreg"]} if "maxnreg" in request else {}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", request["arch"], 32), options=options
    )
    return read_cubin(
        request["name"], request["arch"], compiled.asm["cubin"], compiled.metadata.shared
    )


def read_cubin(name: str, arch: int, cubin: bytes, shared: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    lines = sass_lines(sass)
    code = [line for _, line in lines]
    return Report(
        name,
        arch,
        int(found[1]),
        int(found[2]),
        sum(_is(line, "LDL", "STL") for line in code),
        shared,
        main_loops(lines),
        _loop(code),
    )


def sass_lines(sass: str) -> list[tuple[str, str]]:
    """(label before it, instruction) of every instruction, in order."""
    out: list[tuple[str, str]] = []
    label = ""
    for line in sass.splitlines():
        if named := re.match(r"\s*(\.L_\S+):", line):
            label = named[1]
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            out.append((label, code[1].strip()))
            label = ""
    return out


def main_loops(lines: list[tuple[str, str]]) -> list[Loop]:
    """Innermost loops (from a label to a branch back to it) that read or write 16 bytes or compute
    exponentials.
    """
    at = {label: i for i, (label, _) in enumerate(lines) if label}
    spans = []
    for i, (_, code) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?\(?(\.L_[\w.]+)\)?", code)
        if target and at.get(target[1], i + 1) < i:
            spans.append((at[target[1]], i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [_loop([code for _, code in lines[start : stop + 1]]) for start, stop in inner]
    return [loop for loop in loops if loop.vector_loads or loop.exponentials]


def _loop(code: list[str]) -> Loop:
    def count(*names: str) -> int:
        return sum(_is(line, *names) for line in code)

    loads, stores = count("LDG"), count("STG")
    wide_loads, wide_stores = (
        sum(_is(line, name) and ".128" in line for line in code) for name in ("LDG", "STG")
    )
    return Loop(
        len(code),
        sum("MUFU.EX2" in line for line in code),
        wide_loads,
        loads - wide_loads,
        wide_stores,
        stores - wide_stores,
        count("BAR"),
    )


def _is(line: str, *names: str) -> bool:
    """Whether an instruction (its predicate apart) is one of these."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split(".")[0].split(" ")[0] in names


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def reports(requests: list[dict[str, Any]], *, cache: Path) -> list[Report]:
    """Compiles the requests in a fresh interpreter whose triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        Report(
            **{
                **report,
                "loops": [Loop(**loop) for loop in report["loops"]],
                "whole": Loop(**report["whole"]),
            }
        )
        for report in out
    ]


if __name__ == "__main__":
    for one in json.load(sys.stdin):
        print(json.dumps(asdict(compile_kernel(one))), flush=True)
