"""A parsed module to C++: registers become locals, branches gotos, and each instruction one statement.

The statements call what `cpp/ptx.h` declares. An opcode or modifier that is not known is an EmulationError when the
module is loaded, never a wrong result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .parse import SIZES, EmulationError, Function, Instruction, Module, Operand, Variable, cpp_name, immediate

SHARED_START = 1024  # as in cpp/machine.h

# C++ types of integers, and how floating-point values are read from the bits of a register and written back.
CTYPE = {"pred": "bool"} | {f"{k}{n}": f"{'s' if k == 's' else 'u'}{n}" for k in "bsu" for n in (8, 16, 32, 64)}
READ = {t: t + "({})" for t in ("f32", "f64", "f16", "bf16")}
WRITE = {"f32": "b(float({}))", "f64": "b(double({}))", "f16": "to_f16({})", "bf16": "to_bf16({})"}

# fmt: off
SPECIAL = {  # 10 "Special Registers"
    "laneid": "self->lane", "warpid": "self->warp", "nwarpid": "self->warps", "smid": "0", "nsmid": "1", "gridid": "0",
    "cluster_ctarank": "self->cluster_rank", "cluster_nctarank": "self->cluster_size",
    "is_explicit_cluster": "(self->cluster_size > 1)", "dynamic_smem_size": "self->dynamic_shared",
    "total_smem_size": "self->total_shared", "aggr_smem_size": "self->total_shared",
    "clock": "u32(clock_ticks(self))", "clock64": "clock_ticks(self)", "globaltimer": "clock_ticks(self)",
    "lanemask_eq": "(1u << self->lane)", "lanemask_le": "((2u << self->lane) - 1)",
    "lanemask_lt": "((1u << self->lane) - 1)", "lanemask_ge": "~((1u << self->lane) - 1)",
    "lanemask_gt": "~((2u << self->lane) - 1)",
} | {
    f"{name}.{axis}": f"self->{name}[{d}]" for d, axis in enumerate("xyz")
    for name in ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid")
}
# fmt: on


def half(type_: str) -> tuple[str, int]:
    """The element of a packed type, and how many there are."""
    return (type_[:-2], 2) if type_.endswith("x2") else (type_, 1)


def yes(condition: object) -> str:
    """A condition in C++."""
    return "true" if condition else "false"


class Modifiers:
    """The parts of an opcode after its first, taken one by one; what is left over is not known."""

    def __init__(self, opcode: str, where: str) -> None:
        self.name, *self.left = opcode.split(".")
        self.where = where

    def take(self, *names: str) -> str | None:
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return None

    def flag(self, *names: str) -> bool:
        return self.take(*names) is not None

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise EmulationError(f"{self.where}: none of {', '.join('.' + n for n in names)} is there")
        return found

    def needs(self, *names: str) -> None:
        """All of them."""
        for name in names:
            self.need(name)

    def type(self) -> str:
        """The last part, a type."""
        if not self.left or self.left[-1] not in SIZES:
            raise EmulationError(f"{self.where}: no type that is known")
        return self.left.pop()


Handler = Callable[["Writer", Instruction, Modifiers], str]
HANDLERS: dict[str, Handler] = {}


def opcode(*names: str) -> Callable[[Handler], Handler]:
    """Makes a function the translation of opcodes, by their first part."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Writer:
    """Writes one function. blocks: opcodes of instructions that are entered together, to be counted."""

    def __init__(self, module: Module, function: Function, layout: dict[str, str], blocks: list[Counter[str]]) -> None:
        self.module, self.function, self.layout, self.blocks = module, function, layout, blocks
        self.line = self.sites = 0
        self.used: set[str] = set()
        self.targets: set[str] = {label for labels in function.tables.values() for label in labels}
        self.shared_registers: dict[str, int] = {}  # that wgmma names: in an array `w` that the runtime sees
        self.tables: list[str] = []
        for i in function.body:
            if i.opcode:
                self.targets.update(o.name for o in i.operands if o.kind == "label")
            if i.opcode.startswith("wgmma.mma_async"):
                for part in i.operands[0].parts + i.operands[1].parts:
                    self.shared_registers.setdefault(part.name, len(self.shared_registers))

    def error(self, why: str) -> EmulationError:
        return EmulationError(f"{self.where()}: {why}")

    def where(self) -> str:
        return f"line {self.line} of {self.function.name}, {' '.join(self.module.lines[self.line - 1].split())!r}"

    # --- operands ---------------------------------------------------------------------------------------------------
    def register(self, name: str) -> str:
        self.used.add(name)
        return f"w[{self.shared_registers[name]}]" if name in self.shared_registers else name

    def raw(self, o: Operand, type_: str) -> str:
        """The bits of an operand."""
        if o.kind == "register":
            return "!" * o.negated + self.register(o.name)
        if o.kind == "number":
            value = immediate(o.name, "b16" if type_ in ("f16", "bf16") else type_)
            if type_ == "pred":
                return yes((value != 0) != o.negated)
            return f"u{8 * SIZES[type_]}({value:#x}u{'ll' if SIZES[type_] == 8 else ''})"
        if o.kind == "special":
            if o.name[1:] not in SPECIAL:
                raise self.error(f"the special register {o.name} is not modelled")
            return SPECIAL[o.name[1:]]
        if o.kind == "symbol":
            return f"({self.base(o)} + {o.offset})"
        if o.kind == "vector":  # 9.7.9.4 mov packs
            width = 8 * SIZES[type_] // len(o.parts)
            parts = (f"u64(u{width}({self.raw(p, f'b{width}')})) << {width * n}" for n, p in enumerate(o.parts))
            return f"({' | '.join(parts)})"
        raise self.error(f"an operand of kind {o.kind} is not expected")

    def base(self, o: Operand) -> str:
        """The address of a variable."""
        if o.name not in self.layout:
            raise self.error(f"the address of {o.name} is not known")
        return self.layout[o.name]

    def get(self, o: Operand, type_: str, high: bool = False) -> str:
        """The value of an operand; high: of the upper half of a packed one."""
        if type_ == "pred":
            return self.raw(o, type_)
        if high:
            raw = f"({self.raw(o, 'b32')} >> 16)"
        else:
            raw = self.raw(o, type_)
        return READ[type_].format(raw) if type_ in READ else f"{CTYPE.get(type_, 'u32')}({raw})"

    def storage(self, name: str) -> str:
        type_ = self.function.registers[name]
        return "bool" if type_ == "pred" else f"u{max(16, 8 * SIZES[type_])}"

    def assign(self, o: Operand, bits: str) -> str:
        """Bits into a register."""
        if o.kind == "sink":
            return f"(void)({bits});"
        if o.kind != "register":
            raise self.error("the destination is no register")
        return f"{self.register(o.name)} = {self.storage(o.name)}({bits});"

    def set(self, o: Operand, type_: str, value: str) -> str:
        """A value into a register."""
        return self.assign(o, WRITE[type_].format(value) if type_ in WRITE else value)

    def address(self, o: Operand, shared: bool = False) -> str:
        """The address in brackets; shared: its 32 bits."""
        text = self.raw(o.parts[0], "b64" if o.parts[0].kind == "number" else "b32")
        return f"u32({text} + {o.offset})" if shared else f"u64({text} + {o.offset}ll)"

    def site(self) -> int:
        """A number for each instruction that the counter of bank conflicts follows."""
        self.sites += 1
        return self.sites

    def table(self, operands: tuple[Operand, ...]) -> str:
        """An array of numbers of shared registers."""
        name = f"{cpp_name(self.function.name)}_table{len(self.tables)}"
        numbers = ", ".join(str(self.shared_registers[o.name]) for o in operands)
        self.tables.append(f"static const u16 {name}[] = {{{numbers}}};")
        return name

    # --- statements -------------------------------------------------------------------------------------------------
    def block(self) -> str:
        self.blocks.append(Counter())
        return f"self->counts[{len(self.blocks) - 1}]++;"

    def statement(self, i: Instruction) -> str:
        self.line = i.line
        if not i.opcode:
            label = i.operands[0].name
            return f"{label}: {self.block()}" if label in self.targets else ""
        self.blocks[-1][i.opcode] += 1
        mods = Modifiers(i.opcode, self.where())
        if mods.name not in HANDLERS:
            raise self.error(f"unknown opcode {i.opcode}")
        try:
            text = HANDLERS[mods.name](self, i, mods)
        except (IndexError, KeyError, ValueError) as e:
            raise self.error(f"cannot be translated ({e!r})") from e
        if mods.left:
            raise self.error(f"the modifier .{mods.left[0]} is not modelled")
        if i.predicate is not None:
            text = f"if ({self.raw(i.predicate, 'pred')}) {{ {text} }}"
        return f"{text} {self.block()}" if mods.name in ("bra", "brx", "ret", "exit") else text

    def write(self) -> str:
        f = self.function
        lines = [self.block(), *map(self.statement, f.body)]
        kinds: dict[str, list[str]] = {}
        for name in f.registers:
            if name in self.used and name not in self.shared_registers:
                kinds.setdefault(self.storage(name), []).append(name)
        head = [self.signature() + " {", "u32 carry = 0;"]
        for kind, names in kinds.items():  # what was never written is poison
            head.append(f"{kind} {', '.join(f'{n} = {kind}(-1)' for n in names)};")
        arrays = [
            (f"alignas({max(v.align, 16)}) u8", v.name, v.size) for v in f.variables if v.space in ("local", "param")
        ]
        for kind, name, size in [("u32", "w", len(self.shared_registers)), *arrays]:
            if size:
                head.append(f"{kind} {name}[{size}]; __builtin_memset({name}, 0xFF, sizeof {name});")
        return "\n".join([*self.tables, *head, *filter(None, lines), "return; (void)carry; }"])

    def signature(self) -> str:
        f = self.function
        if f.is_entry:
            return f'extern "C" void {cpp_name(f.name)}(Thread* self)'
        return f"static void {cpp_name(f.name)}(Thread* self{''.join(f', u8* {v.name}' for v in f.results + f.params)})"


@dataclass
class Kernel:
    """What a launch of an entry point must know."""

    name: str
    params: list[tuple[str, int, int]]  # name, size, alignment
    offsets: list[int]
    params_size: int
    static_shared: int  # where the dynamic shared memory begins, SHARED_START included
    required_block: tuple[int, int, int] | None
    required_cluster: tuple[int, int, int] | None


@dataclass
class Translation:
    source: str
    kernels: dict[str, Kernel]
    blocks: list[Counter[str]]
    variables: list[Variable]  # in global and constant memory


def up(n: int, align: int) -> int:
    return -(-n // align) * align


def lay_out(variables: list[Variable], at: int) -> tuple[list[int], int]:
    """Offsets of variables one after the other, and the end."""
    offsets = []
    for v in variables:
        offsets.append(up(at, v.align))
        at = offsets[-1] + v.size
    return offsets, at


def memory(v: Variable) -> str:
    """A variable in global or constant memory; without an initial value it is zero (5.4.4)."""
    head = f'extern "C" {{ alignas({max(v.align, 16)})'
    if any(isinstance(d, tuple) for d in v.data or ()):
        words = ", ".join(f"(u64){d[0]} + {d[1]}" for d in v.data or () if isinstance(d, tuple))
        return f"{head} u64 {v.name}[{v.size // 8}] = {{{words}}}; }}"
    return f"{head} u8 {v.name}[{max(v.size, 1)}] = {{{', '.join(map(str, v.data or (0,)))}}}; }}"


def translate(module: Module) -> Translation:
    """C++ for a module.

    Raises:
        EmulationError: an opcode or modifier is not known.
    """
    from . import operations_async, operations_scalar, operations_warp  # noqa: F401  they fill HANDLERS

    dynamic = [v for v in module.variables if v.space == "shared" and v.extern]
    outside = [v for v in module.variables if v.space in ("global", "const") and not v.extern]
    common = [v for v in module.variables if v.space == "shared" and not v.extern]
    common += [v for f in module.functions if not f.is_entry for v in f.variables if v.space == "shared"]
    offsets, end = lay_out(common, SHARED_START)
    known = {v.name: str(at) for v, at in zip(common, offsets, strict=True)}
    known |= {v.name: f"(u64){v.name}" for v in outside} | {v.name: "self->dynamic_start" for v in dynamic}
    translation = Translation("", {}, [], outside)
    functions, prototypes = [], []
    for f in module.functions:
        own = [v for v in f.variables if v.space == "shared"] if f.is_entry else []
        shared, top = lay_out(own, end)
        params, size = lay_out(f.params, 0)
        layout = known | {v.name: str(at) for v, at in zip(own, shared, strict=True)}
        layout |= {v.name: f"(u64){v.name}" for v in [*f.variables, *f.results, *f.params] if v.space != "shared"}
        if f.is_entry:
            layout |= {v.name: f"(u64)(self->params + {at})" for v, at in zip(f.params, params, strict=True)}
            start = up(top, max([16, *(v.align for v in dynamic)]))
            translation.kernels[f.name] = Kernel(
                f.name, [(p.ptx_name, p.size, p.align) for p in f.params], params, size, start,
                f.required.get("reqntid"), f.required.get("reqnctapercluster"),
            )  # fmt: skip
        writer = Writer(module, f, layout, translation.blocks)
        functions.append(writer.write())
        prototypes.append("" if f.is_entry else writer.signature() + ";")
    head = ['#include "ptx.h"', "using namespace ptx;", *map(memory, outside), *prototypes]
    translation.source = "\n".join(head + functions) + "\n"
    return translation
