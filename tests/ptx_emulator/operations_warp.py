"""Instructions that threads carry out together: shuffles, votes, barriers, matrix products.

Section numbers are those of the PTX ISA 9.0.
"""

from __future__ import annotations

import re

from .parse import EmulationError, Instruction, Operand
from .translate import Modifiers, Writer, opcode, yes

FORMATS = {t: f"T_{t.upper()}" for t in ("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "f32", "s32")}
PER_REGISTER = {"f16": 2, "bf16": 2, "e4m3": 4, "e5m2": 4, "s8": 4, "u8": 4}


def both(w: Writer, target: Operand, call: str) -> str:
    """A call with a result and `bool v`, into d or d|p."""
    parts = target.parts if target.kind == "pair" else (target, Operand("sink"))
    return f"{{ bool v; u32 d = {call}; {w.assign(parts[0], 'd')} {w.assign(parts[1], 'v')} }}"


def array(w: Writer, name: str, source: Operand) -> str:
    parts = source.parts if source.kind == "vector" else (source,)
    values = ", ".join(f"u32({w.raw(p, 'b32')})" for p in parts)
    return f"u32 {name}[] = {{{values}}};"


def into(w: Writer, call: str, target: Operand, size: int) -> str:
    """A call that fills `u32 d[size]`, and its result to registers."""
    parts = target.parts if target.kind == "vector" else (target,)
    return f"{{ u32 d[{size}]; {call} {' '.join(w.assign(p, f'd[{n}]') for n, p in enumerate(parts))} }}"


# --- 9.7.9.6 shfl.sync, 9.7.13.9 to 9.7.13.12 votes, 9.7.13.14 elect.sync -----------------------------------------
@opcode("shfl")
def shuffle(w: Writer, i: Instruction, m: Modifiers) -> str:
    m.needs("sync", "b32")
    mode = m.need("up", "down", "bfly", "idx").upper()
    a, b, c, mask = (w.get(o, "b32") for o in i.operands[1:])
    return both(w, i.operands[0], f"collect(self, {mode}, {a}, {b}, {c}, {mask}, &v, {i.line})")


@opcode("vote", "match", "elect", "redux")
def vote(w: Writer, i: Instruction, m: Modifiers) -> str:
    m.need("sync")
    *source, mask = i.operands[1:]
    if m.name == "elect":
        kind, value = "ELECT", "0"
    else:
        name, type_ = m.left.pop(0), m.left.pop()
        kind = f"{m.name}_{name}".upper() if m.name != "redux" or type_ != "s32" else f"REDUX_S{name.upper()}"
        value = w.get(source[0], "pred" if m.name == "vote" else type_)
        if type_ not in ("pred", "b32", "b64", "u32", "s32"):
            raise EmulationError(f"{m.where}: this type is not modelled")
    return both(w, i.operands[0], f"collect(self, {kind}, {value}, 0, 0, {w.get(mask, 'b32')}, &v, {i.line})")


@opcode("activemask")
def active(w: Writer, i: Instruction, m: Modifiers) -> str:
    """Threads run on their own here: a thread is sure of itself alone, which every correct kernel must allow for."""
    m.need("b32")
    return w.assign(i.operands[0], "1u << self->lane")


# --- 9.7.13.1 to 9.7.13.3 barriers --------------------------------------------------------------------------------
@opcode("bar", "barrier")
def barrier(w: Writer, i: Instruction, m: Modifiers) -> str:
    operands = list(i.operands)
    if m.flag("warp"):
        m.need("sync")
        return f"warp_barrier(self, {w.get(operands[0], 'b32')}, {i.line});"
    m.flag("aligned")
    if m.flag("cluster"):
        kind, relaxed = m.need("arrive", "wait"), m.flag("relaxed")
        m.flag("release", "acquire")
        return f"cluster_{kind}(self, {yes(not relaxed)}, {i.line});"
    m.flag("cta")
    kind = m.need("sync", "arrive", "red")
    reduction, predicate, target = "NONE", "false", Operand("sink")
    if kind == "red":
        reduction = m.need("popc", "and", "or").upper()
        m.need("u32", "pred")
        target, predicate = operands.pop(0), w.get(operands.pop(), "pred")
    number, count = w.get(operands[0], "b32"), w.get(operands[1], "b32") if len(operands) > 1 else "0"
    return w.assign(
        target, f"barrier(self, {number}, {count}, {yes(kind != 'arrive')}, {reduction}, {predicate}, {i.line})"
    )


# --- 9.7.14 matrices of a warp ------------------------------------------------------------------------------------
@opcode("ldmatrix", "stmatrix")
def matrix_rows(w: Writer, i: Instruction, m: Modifiers) -> str:
    m.needs("sync", "aligned", "m8n8", "b16")
    count, transposed = int(m.need("x1", "x2", "x4")[1:]), yes(m.flag("trans"))
    m.flag("shared", "shared::cta")
    if m.name == "ldmatrix":
        address = w.address(i.operands[1], shared=True)
        return into(w, f"ldmatrix(self, {address}, {count}, {transposed}, d, {i.line});", i.operands[0], count)
    address = w.address(i.operands[0], shared=True)
    return f"{{ {array(w, 'a', i.operands[1])} stmatrix(self, {address}, {count}, {transposed}, a, {i.line}); }}"


@opcode("movmatrix")
def movmatrix(w: Writer, i: Instruction, m: Modifiers) -> str:
    m.needs("sync", "aligned", "m8n8", "trans", "b16")
    return w.assign(i.operands[0], f"movmatrix(self, {w.get(i.operands[1], 'b32')}, {i.line})")


@opcode("mma")
def mma(w: Writer, i: Instruction, m: Modifiers) -> str:
    """9.7.14.5.14."""
    m.needs("sync", "aligned", "row", "col")
    saturate = m.flag("satfinite")
    shape, d, a, b, c = m.left
    m.left.clear()
    match = re.fullmatch(r"m16n8k(\d+)", shape)
    if match is None or not {a, b, c, d} <= set(FORMATS) or (d == "s32") != (a in ("s8", "u8")):
        raise EmulationError(f"{m.where}: this product is not modelled")
    k = int(match[1])
    if len(i.operands[1].parts) * PER_REGISTER.get(a, 1) * 2 != k:
        raise EmulationError(f"{m.where}: the number of registers of A does not fit")
    arrays = " ".join(array(w, name, o) for name, o in zip("abc", i.operands[1:], strict=True))
    types = ", ".join([*(FORMATS[t] for t in (a, b, c, d)), yes(saturate)])
    return into(w, f"{arrays} mma(self, {k}, {types}, d, a, b, c, {i.line});", i.operands[0], 4)


# --- 9.7.15 matrices of a warpgroup -------------------------------------------------------------------------------
@opcode("wgmma")
def wgmma(w: Writer, i: Instruction, m: Modifiers) -> str:
    kind = m.need("mma_async", "fence", "commit_group", "wait_group")
    m.needs("sync", "aligned")
    if kind == "fence":
        return ";"
    if kind == "commit_group":
        return f"wgmma_commit(self, {i.line});"
    if kind == "wait_group":
        return f"wgmma_wait(self, {w.get(i.operands[0], 'b32')}, {i.line});"
    shape, d, a, b = m.left
    m.left.clear()
    match = re.fullmatch(r"m64n(\d+)k(\d+)", shape)
    n, k = (int(match[1]), int(match[2])) if match else (0, 0)
    sums = ("s32",) if a in ("s8", "u8") else ("f16", "f32")
    if n % 8 or not 8 <= n <= 256 or k != 8 * PER_REGISTER.get(a, 1) or not {a, b} <= set(FORMATS) or d not in sums:
        raise EmulationError(f"{m.where}: this product is not modelled")
    targets, a_operand, b_operand, scale_d, *rest = i.operands
    if len(targets.parts) * PER_REGISTER.get(d, 1) * 2 != n:
        raise EmulationError(f"{m.where}: the number of registers of D does not fit")
    numbers = [int(o.name) for o in rest] if d != "s32" else [1, 1]
    if len(numbers) > 2 and PER_REGISTER.get(a) != 2:  # 9.7.15.5: others are K-major
        raise EmulationError(f"{m.where}: only operands of 16 bits can be transposed")
    in_registers = a_operand.kind == "vector"  # it cannot be transposed then
    transposed = ([0] * in_registers + numbers[2:] + [0, 0])[:2]
    a_fields = [w.table(a_operand.parts), "0"] if in_registers else ["nullptr", w.get(a_operand, "b64")]
    formats, d_field = [FORMATS[a], FORMATS[b], FORMATS[d]], w.table(targets.parts)
    fields = [str(n), *formats, "w", d_field, *a_fields, w.get(b_operand, "b64"), w.get(scale_d, "pred")]
    fields += [*map(yes, transposed), *map(str, numbers[:2]), str(i.line)]
    return f"wgmma(self, Wgmma{{{', '.join(fields)}}});"
