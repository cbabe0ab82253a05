"""Loads, stores and atomics, asynchronous copies, mbarriers. Section numbers are those of the PTX ISA 9.0."""

from __future__ import annotations

from .operations_warp import FORMATS
from .parse import SIZES, EmulationError, Instruction, Operand
from .translate import CTYPE, READ, WRITE, Modifiers, Writer, half, opcode, yes

SHARED = ("shared", "shared::cta", "shared::cluster")
SPACES = ("global", *SHARED, "local", "const", "param", "param::entry", "param::func")
SCOPES = ("cta", "cluster", "gpu", "sys")
CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")


def hints(m: Modifiers) -> None:
    """Takes what concerns caches alone; of a cache policy, see `policies`."""
    m.left = [n for n in m.left if n not in CACHE and not n.startswith(("L1::", "L2::"))]


def elements(m: Modifiers) -> int:
    return int((m.take("v2", "v4", "v8") or "v1")[1:])


def reach(w: Writer, i: Instruction, o: Operand, space: str | None, size: int, how: str, data: str = "nullptr") -> str:
    """A checked host address."""
    if space and space.startswith(("param", "const")):
        return f"(u8*){w.address(o)}"
    shared = space in SHARED
    name = "reach_shared" if shared else "reach"
    return f"{name}(self, {w.address(o, shared)}, {size}, {how}, {data}, {w.site()}, {i.line})"


def order(word: str | None) -> str:
    """9.7.13.4: what a location orders that is acquired or released."""
    flags = [yes(word in (kind, "acq_rel")) for kind in ("acquire", "release")]
    return f"synchronize_location(self, (u64)s, {', '.join(flags)});" if "true" in flags else ""


# --- 9.7.9.8 ld, 9.7.9.11 st, 9.7.13.5 atom, 9.7.13.6 red ---------------------------------------------------------
@opcode("ld", "ldu", "st")
def load_store(w: Writer, i: Instruction, m: Modifiers) -> str:
    strength = m.take("weak", "volatile", "relaxed", "acquire", "release", "mmio")
    m.flag(*SCOPES)
    space = m.take(*SPACES)
    hints(m)
    count, type_ = elements(m), m.type()
    type_ = type_ if type_ in CTYPE else f"b{8 * SIZES[type_]}"
    size, c = count * SIZES[type_], CTYPE[type_]
    strong = " | ATOMIC" if strength not in (None, "weak") else ""
    place, value = i.operands[:2] if m.name == "st" else (i.operands[1], i.operands[0])
    parts = value.parts if value.kind == "vector" else (value,)
    if m.name == "st":
        values = ", ".join(f"{c}({w.raw(p, type_)})" for p in parts)
        pointer = reach(w, i, place, space, size, "WRITE" + strong, "v")
        return f"{{ {c} v[] = {{{values}}}; u8* s = {pointer}; {order(strength)} __builtin_memcpy(s, v, {size}); }}"
    loads = " ".join(w.assign(p, f"s[{n}]") for n, p in enumerate(parts))
    return f"{{ {c}* s = ({c}*){reach(w, i, place, space, size, 'READ' + strong)}; {order(strength)} {loads} }}"


# fmt: off
ATOMIC = {
    "add": "{x} + {y}", "min": "smaller<{T}>({x}, {y})", "max": "larger<{T}>({x}, {y})", "and": "{x} & {y}",
    "or": "{x} | {y}", "xor": "{x} ^ {y}", "exch": "{y}", "inc": "{x} >= {y} ? 0 : {x} + 1",
    "dec": "{x} == 0 || {x} > {y} ? {y} : {x} - 1",
}
# fmt: on


def combined(op: str, type_: str, old: str, new: str) -> str:
    """The new bits of a location."""
    if half(type_)[1] == 2:
        low, high = (combined(op, type_[:-2], f"({old} >> {s} & 0xFFFF)", f"({new} >> {s} & 0xFFFF)") for s in (0, 16))
        return f"join32({low}, {high})"
    if type_ in READ:
        x, y = READ[type_].format(old), READ[type_].format(new)
        template = {"min": "least({x}, {y}, false)", "max": "greatest({x}, {y}, false)"}.get(op, ATOMIC[op])
        return WRITE[type_].format(template.format(x=x, y=y)).replace("b(", "ptx::b(", 1)
    c = CTYPE[type_]
    return f"({ATOMIC[op].format(x=f'{c}({old})', y=f'{c}({new})', T=c)})"


@opcode("atom", "red")
def atomic(w: Writer, i: Instruction, m: Modifiers) -> str:
    strength = m.take("relaxed", "acquire", "release", "acq_rel")
    m.flag(*SCOPES)
    space = m.take("global", *SHARED)
    op = m.need(*ATOMIC, "cas")
    m.flag("noftz")
    hints(m)
    count, type_ = elements(m), m.type()
    target, place, value, *rest = i.operands if m.name == "atom" else (Operand("sink"), *i.operands)
    u = f"u{8 * SIZES[type_]}"
    lines = []
    for n, part in enumerate(value.parts if value.kind == "vector" else (value,)):
        b = f"{u}({w.raw(part, type_)})"
        new = f"(old == {b} ? {u}({w.raw(rest[0], type_)}) : old)" if op == "cas" else combined(op, type_, "old", b)
        keep = w.assign(target.parts[n] if target.kind == "vector" else target, "old")
        lines.append(f"{{ {u} old = s[{n}]; s[{n}] = {u}({new}); {keep} }}")
    pointer = reach(w, i, place, space, SIZES[type_] * count, "WRITE | ATOMIC")
    return f"{{ {u}* s = ({u}*){pointer}; {order(strength)} {' '.join(lines)} }}"


# --- 9.7.9.25 asynchronous copies ---------------------------------------------------------------------------------
@opcode("cp")
def copy(w: Writer, i: Instruction, m: Modifiers) -> str:
    reduce, policy, o = m.flag("reduce"), m.flag("L2::cache_hint"), list(i.operands)
    m.need("async")
    if policy:
        o.pop()
    if m.flag("bulk"):
        return bulk(w, i, m, o, reduce)
    if m.flag("commit_group"):
        return "cp_async_commit(self);"
    if m.flag("wait_all"):
        return f"cp_async_commit(self); cp_async_wait(self, 0, {i.line});"
    if m.flag("wait_group"):
        return f"cp_async_wait(self, {w.get(o[0], 'b32')}, {i.line});"
    if m.flag("mbarrier"):
        m.needs("arrive", "b64")
        counted = yes(not m.flag("noinc"))
        m.flag(*SHARED)
        return f"cp_async_arrive(self, {w.address(o[0])}, {counted}, {i.line});"
    m.need(*SHARED)
    m.need("global")
    hints(m)
    size = int(o[2].name, 0)
    if size not in (4, 8, 16):
        raise EmulationError(f"{m.where}: 4, 8 or 16 bytes are copied")
    count = str(size)
    if len(o) == 4:  # how many bytes to read, or a predicate that says to read none
        ignored = o[3].kind == "register" and w.function.registers[o[3].name] == "pred"
        count = f"({w.get(o[3], 'pred')} ? 0 : {size})" if ignored else w.get(o[3], "b32")
    return f"cp_async(self, {w.address(o[0], True)}, {w.address(o[1])}, {size}, {count}, {w.site()}, {i.line});"


def bulk(w: Writer, i: Instruction, m: Modifiers, o: list[Operand], reduce: bool) -> str:
    """9.7.9.25.4 and 9.7.9.27."""
    if m.flag("commit_group"):
        return "bulk_commit(self);"
    if m.flag("wait_group"):
        m.flag("read")  # a bulk store reads and writes at one moment here
        return f"bulk_wait(self, {w.get(o[0], 'b32')});"
    if m.flag("prefetch"):
        m.left.clear()
        return ";"
    tensor, multicast = m.flag("tensor"), m.flag("multicast::cluster")
    rank = int(m.need("1d", "2d", "3d", "4d", "5d")[0]) if tensor else 0
    loads = m.flag("mbarrier::complete_tx::bytes")
    m.flag("tile", "noftz")
    hints(m)
    spaces = [n for n in m.left if n in SPACES]
    m.left = [n for n in m.left if n not in SPACES]
    how, type_ = "COPY", "f32"
    if reduce:
        how = m.need("add", "min", "max").upper()
        type_ = "f32" if tensor else m.need("f32", "f16", "bf16", "s32", "u32", "b32")
    barrier, mask = "0", f"{w.get(o.pop(), 'b32')} & 0xFFFF" if multicast else "0"
    if loads:
        barrier = w.address(o.pop())
    else:
        m.need("bulk_group")
    if tensor:
        place, shared = (o[1], w.address(o[0])) if loads else (o[0], w.address(o[1], True))
        coordinates = place.parts[1].parts
        if len(coordinates) != rank or len(o) != 2:
            raise EmulationError(f"{m.where}: the operands do not fit to {rank} dimensions")
        at = f"s32 at[] = {{{', '.join(w.get(c, 's32') for c in coordinates)}}};"
        tail = f"{barrier}, {mask}, {i.line}" if loads else f"{how}, {i.line}"
        return f"{{ {at} tma_{'load' if loads else 'store'}(self, {shared}, {w.address(place)}, {rank}, at, {tail}); }}"
    kind = (
        "GLOBAL_FROM_SHARED" if not loads else "SHARED_FROM_GLOBAL" if spaces[1] == "global" else "SHARED_FROM_SHARED"
    )
    type_ = FORMATS.get(type_, "T_S32")
    where = f"{w.address(o[0])}, {w.address(o[1])}, {w.get(o[2], 'b32')}"
    return f"bulk_copy(self, {kind}, {where}, {barrier}, {mask}, {how}, {type_}, {i.line});"


# --- 9.7.13.15 mbarrier, 9.7.9.23 mapa ----------------------------------------------------------------------------
@opcode("mbarrier")
def mbarrier(w: Writer, i: Instruction, m: Modifiers) -> str:
    kind = m.need("init", "inval", "arrive", "arrive_drop", "test_wait", "try_wait", "expect_tx", "complete_tx")
    expects, parity, ordered = m.flag("expect_tx"), m.flag("parity"), yes(not m.flag("relaxed"))
    m.flag("release", "acquire")
    m.flag("cta", "cluster")
    m.flag(*SHARED)
    m.need("b64")
    if kind in ("init", "inval", "expect_tx", "complete_tx"):
        name = kind if kind.startswith("in") else "expect"
        values = [w.address(i.operands[0]), *(w.get(o, "b32") for o in i.operands[1:])]
        values += [yes(kind == "complete_tx")] if name == "expect" else []
        return f"mbarrier_{name}(self, {', '.join(values)}, {i.line});"
    target, place, *rest = i.operands
    if kind in ("test_wait", "try_wait"):
        state = w.get(rest[0], "b32" if parity else "b64")
        return w.assign(target, f"mbarrier_wait(self, {w.address(place)}, {state}, {yes(parity)}, {ordered}, {i.line})")
    number = w.get(rest[0], "b32") if rest else "1"
    count = f"1, {number}" if expects else f"{number}, 0"
    drop = yes(kind == "arrive_drop")
    return w.assign(target, f"mbarrier_arrive(self, {w.address(place)}, {count}, {ordered}, {drop}, {i.line})")


@opcode("mapa", "getctarank")
def cluster_address(w: Writer, i: Instruction, m: Modifiers) -> str:
    type_, shared = m.need("u32", "u64"), m.flag("shared::cluster")
    address = f"u32({w.raw(i.operands[1], type_)})"
    if m.name == "getctarank":
        return w.assign(i.operands[0], f"{address} >> 24 ? ({address} >> 24) - 1 : self->cluster_rank")
    value = f"mapa(self, {address}, {w.get(i.operands[2], 'b32')}, {i.line})"
    return w.assign(i.operands[0], value if shared else f"SHARED_WINDOW | {value}")
