"""Reads PTX as triton writes it: parameters, registers, and instructions with their operands.

PTX ISA 8.7 (docs.nvidia.com/cuda/parallel-thread-execution) is the source of the syntax. What is
not understood is an error: nothing is skipped but directives that concern debuggers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

WIDTH = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "s16x2": 32, "u16x2": 32, "f32x2": 64}
WIDTH |= {f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register, a parameter, shared memory, or "" for a number alone."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """`@guard op args`: op in its parts ("ld", "global", "b32"). For messages: the line, and that
    of the source.
    """

    guard: str
    negated: bool
    op: tuple[str, ...]
    args: tuple[Operand, ...]
    text: str
    source: str


@dataclass
class Kernel:
    """One entry point. `labels`: instruction that a label stands before."""

    name: str = ""
    threads: int = 0
    parameters: dict[str, str] = field(default_factory=dict)  # name -> type, in order
    # name -> bits; 1 for a predicate
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    source: str = ""  # of what is being read


SKIPPED = (
    ".version",
    ".target",
    ".address_size",
    ".file",
    ".loc",
    ".maxnreg",
    ".minnctapersm",
    ".maxntid",
    ".pragma",
    ".extern .shared",
    ".global",
    ".section",
    ".b8",
    ".b32",
    ".b64",
    ".weak",
    ".visible .entry",
)


def read(text: str) -> Kernel:
    """The kernel of a module that has one entry; ValueError for what is not understood."""
    kernel = Kernel()
    body, _, _ = text.partition("\t.section")  # debug information is last
    for number, raw in enumerate(body.splitlines(), 1):
        line, _, comment = raw.partition("//")
        line = line.strip()
        if line.startswith(".loc"):
            kernel.source = comment.strip()
        try:
            _line(kernel, line)
        except (ValueError, KeyError, IndexError) as e:
            raise ValueError(f"PTX line {number}: {line!r} is not understood ({e!r})") from e
    if not (kernel.name and kernel.threads and kernel.instructions):
        raise ValueError(
            f"the PTX has entry {kernel.name!r} of {kernel.threads} threads and "
            f"{len(kernel.instructions)} instructions"
        )
    return kernel


def _line(kernel: Kernel, line: str) -> None:
    if found := re.match(r"\.visible \.entry (\w+)\(", line):
        kernel.name = found[1]
    elif found := re.match(r"\.param (?:\.align \d+ )?\.(\w+) .*?(\w+_param_\d+),?$", line):
        kernel.parameters[found[2]] = found[1]
    elif found := re.match(r"\.reqntid (\d+)", line):
        kernel.threads = int(found[1])
    elif found := re.match(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>;", line):
        kernel.registers |= {f"{found[2]}{i}": WIDTH[found[1]] for i in range(int(found[3]))}
    elif found := re.match(r"\.reg \.(\w+)\s+([%\w, ]+);", line):
        kernel.registers |= {name.strip(): WIDTH[found[1]] for name in found[2].split(",")}
    elif found := re.match(r"([$\w]+):$", line):
        kernel.labels[found[1]] = len(kernel.instructions)
    elif found := re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*?);$", line):
        negated, guard, op, args = found.groups()
        parts = tuple(re.sub(r"::", "_", op).split("."))
        kernel.instructions.append(
            Instruction(guard or "", negated == "!", parts, _operands(args), line, kernel.source)
        )
    elif line not in ("", "{", "}", "(", ")") and not line.startswith(SKIPPED):
        raise ValueError("no directive, label or instruction")


def _operands(text: str) -> tuple[Operand, ...]:
    """Split at commas outside of brackets."""
    found = re.findall(r"\[[^]]*\]|\{[^}]*\}|[^,\s]+", text)
    return tuple(_operand(one) for one in found)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{}").split(","))
    if text.startswith("["):
        base, _, offset = text.strip("[]").replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    return text


SINGLE = (("f32",), ("f32x2",))


def fused(kernel: Kernel) -> Kernel:
    """The kernel as ptxas may make it: products and sums of float32 without a rounding of their own
    (PTX's `mul.f32`,
    `add.f32`, `sub.f32`) as one operation, wherever both stand in one block. ptxas does so by
    default (-fmad=true)."""
    starts, out = set(kernel.labels.values()), list(kernel.instructions)
    products: dict[str, Instruction] = {}
    for i, ins in enumerate(kernel.instructions):
        if i in starts or ins.op[0] == "bra":
            products = {}
        if ins.op[0] in ("add", "sub") and ins.op[1:] in SINGLE:
            for which in (1, 2):
                product = products.get(str(ins.args[which]))
                if product is not None:
                    out[i] = _one_operation(ins, product, which)
                    break
        written = {
            name
            for a in ins.args[:1]
            for name in (a if isinstance(a, tuple) else str(a).split("|"))
        }
        products = {
            name: p for name, p in products.items() if not written & {name, *map(str, p.args)}
        }
        if ins.op[0] == "mul" and ins.op[1:] in SINGLE and not ins.guard:
            products[str(ins.args[0])] = ins
    return replace(kernel, instructions=out)


def _one_operation(ins: Instruction, product: Instruction, which: int) -> Instruction:
    """Operand `which` of a sum or difference, which is a product, within it: fma with a sign for
    either part.
    """
    less = ins.op[0] == "sub"
    signs = (
        "plus" if not less or which == 1 else "minus",
        "plus" if not less or which == 2 else "minus",
    )
    args = (ins.args[0], *product.args[1:], ins.args[3 - which])
    return replace(
        ins, op=("fma", *signs, ins.op[-1]), args=args, text=f"{ins.text} fused with {product.text}"
    )
