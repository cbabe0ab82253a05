"""Instructions of one thread on registers: arithmetic, comparisons, logic, conversions, branches.

Most are templates: {0}, {1}, ... are the sources, read as the type of the instruction; {T} is that type in C++, {W} the
integer of twice its width, {N} its width in bits. Section numbers are those of the PTX ISA 9.0.
"""

from __future__ import annotations

from .parse import SIZES, EmulationError, Instruction, Operand, cpp_name
from .translate import CTYPE, READ, Modifiers, Writer, half, opcode, yes

ROUNDINGS = {"rn": "RN", "rz": "RZ", "rm": "RM", "rp": "RP", "rna": "RNA"}
CPP_FLOAT = {"f32": "float", "f64": "double", "f16": "float", "bf16": "float"}  # in which they are computed

# fmt: off
INTEGER = {  # 9.7.1, 9.7.8
    "add": "{T}({0} + {1})", "sub": "{T}({0} - {1})", "mul.lo": "{T}(u64({0}) * u64({1}))",
    "mul.hi": "{T}({W}({0}) * {W}({1}) >> {N})", "mul.wide": "{W}({0}) * {W}({1})",
    "mad.lo": "{T}(u64({0}) * u64({1}) + u64({2}))", "mad.hi": "{T}(({W}({0}) * {W}({1}) >> {N}) + {2})",
    "mad.wide": "{W}({0}) * {W}({1}) + {2}", "mul24.lo": "{T}(short24({0}) * short24({1}))",
    "mad24.lo": "{T}(short24({0}) * short24({1}) + {2})", "sad": "{T}({2} + ({0} < {1} ? {1} - {0} : {0} - {1}))",
    "div": "divide({0}, {1})", "rem": "remainder({0}, {1})", "abs": "{T}({0} < 0 ? -{0} : {0})", "neg": "{T}(-{0})",
    "min": "smaller<{T}>({0}, {1})", "max": "larger<{T}>({0}, {1})", "popc": "__builtin_popcountll({0})",
    "clz": "leading_zeros({0})", "brev": "reverse({0})", "bfind": "highest_bit({0}, false)",
    "bfind.shiftamt": "highest_bit({0}, true)", "bfe": "extract<{T}>({0}, {1}, {2})",
    "bfi": "insert({0}, {1}, {2}, {3})", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
    "not": "{T}(~{0})", "cnot": "{0} == 0",
    "shl": "shift_left({0}, {1})", "shr": "shift_right({0}, {1})", "lop3": "logic3({0}, {1}, {2}, {3})",
    "shf.l.wrap": "funnel_left({0}, {1}, {2} & 31)", "shf.l.clamp": "funnel_left({0}, {1}, smaller<u32>({2}, 32))",
    "shf.r.wrap": "funnel_right({0}, {1}, {2} & 31)", "shf.r.clamp": "funnel_right({0}, {1}, smaller<u32>({2}, 32))",
    "prmt": "permute({0}, {1}, {2})",
}
B32_SOURCES = {"shl": (1,), "shr": (1,), "bfe": (1, 2), "bfi": (2, 3)}
FLOATING = {  # 9.7.3, 9.7.4: rounded to nearest; {F}: float or double
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "fma": "fma_of({0}, {1}, {2})", "div": "{0} / {1}",
    "rcp": "{F}(1) / {0}", "sqrt": "root({0})", "rsqrt": "{F}(1.0 / root(double({0})))", "abs": "__builtin_fabs({0})",
    "neg": "-{0}", "ex2": "exp2_approx({0})", "lg2": "log2_approx({0})", "sin": "sin_approx({0})",
    "cos": "cos_approx({0})", "tanh": "tanh_approx({0})",
}
DIRECTED = {"add": "+", "sub": "-", "mul": "*", "fma": "f", "div": "/", "rcp": "r", "sqrt": "s"}
# fmt: on


def packed(w: Writer, target: Operand, type_: str, values: list[str]) -> str:
    """One value, or two halves, into a register."""
    if len(values) == 1:
        return w.set(target, type_, values[0])
    convert = {"f16": "to_f16({})", "bf16": "to_bf16({})"}.get(type_, "u16({})")
    return w.assign(target, f"join32({', '.join(convert.format(v) for v in values)})")


def compute(
    w: Writer, i: Instruction, type_: str, template: str, ftz: bool = False, after: str = "{}", **names: str
) -> str:
    """dst = after(template(sources)), for each half of a packed type."""
    element, count = half(type_)
    values = []
    for high in range(count):
        sources = [w.get(o, element, bool(high)) for o in i.operands[1:]]
        if ftz and element == "f32":
            sources = [f"flush({s})" for s in sources]
        value = after.format(template.format(*sources, **names))
        values.append(f"flush({value})" if ftz and element == "f32" else value)
    return packed(w, i.operands[0], element, values)


@opcode(*{name.split(".")[0] for name in (*INTEGER, *FLOATING)} - {"min", "max"})
def arithmetic(w: Writer, i: Instruction, m: Modifiers) -> str:
    type_ = m.type()
    element = half(type_)[0]
    if element not in READ:
        return integer(w, i, m, type_)
    bits = 8 * SIZES[element]
    if m.name in ("abs", "neg") and not m.flag("ftz"):  # on the sign bit: a NaN keeps its bits
        sign = 1 << bits - 1 | (1 << 31 if half(type_)[1] == 2 else 0)
        form = "{} & ~u64({:#x}ull)" if m.name == "abs" else "{} ^ u64({:#x}ull)"
        return w.assign(i.operands[0], form.format(w.raw(i.operands[1], type_), sign))
    name = "fma" if m.name == "mad" else m.name
    rounding = m.take("rn", "rz", "rm", "rp") or "rn"
    m.flag("approx", "full")  # taken as exact but for the rounding
    ftz, sat, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    template = FLOATING[name]
    if rounding != "rn":
        sources = ", ".join("{0} {1} {2}".split()[: len(i.operands) - 1] + ["0"] * (4 - len(i.operands)))
        template = f"rounded<{{F}}>('{DIRECTED[name]}', {sources}, {ROUNDINGS[rounding]})"
    elif name == "fma" and bits == 16:
        template = "fused({0}, {1}, {2})"
    after = "saturate({})" if sat else "relu({})" if relu else "{}"
    return compute(w, i, type_, template, ftz, after, F=CPP_FLOAT[element])


def integer(w: Writer, i: Instruction, m: Modifiers, type_: str) -> str:
    key = ".".join([m.name, *filter(None, (m.take("lo", "hi", "wide", "shiftamt", "l", "r"), m.take("wrap", "clamp")))])
    bits = 8 * SIZES[type_]
    if type_ == "pred":
        return w.assign(
            i.operands[0], {"not": "!{0}"}.get(key, INTEGER[key]).format(*(w.get(o, type_) for o in i.operands[1:]))
        )
    carry, mode = m.flag("cc"), m.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    if carry:
        return with_carry(w, i, type_, "+" if key == "add" else "-", "0", True)
    template = f'permute_as({{0}}, {{1}}, {{2}}, "{mode}")' if mode else INTEGER[key]
    if m.flag("sat"):
        template = f"clamp<s32>(s64({{0}}) {'+' if key == 'add' else '-'} s64({{1}}))"
    if half(type_)[1] == 2:
        return compute(w, i, type_, template, T=CTYPE[half(type_)[0]], W="s64", N="16")
    c = CTYPE[type_]
    names = {"T": c, "W": f"{c[0]}{2 * bits}", "N": str(bits)}
    types = [type_] * len(i.operands)
    for n in B32_SOURCES.get(m.name, ()):
        types[n] = "b32"
    if key == "mad.wide":
        types[2] = f"{type_[0]}{2 * bits}"
    return w.assign(
        i.operands[0], template.format(*(w.get(o, t) for o, t in zip(i.operands[1:], types, strict=False)), **names)
    )


def with_carry(w: Writer, i: Instruction, type_: str, sign: str, carry: str, out: bool) -> str:
    """9.7.2: the carry, or borrow, is 1 or 0."""
    bits = 8 * SIZES[type_]
    a, b = (f"u{2 * bits}(u{bits}({w.raw(o, type_)}))" for o in i.operands[1:3])
    set_carry = f"carry = u32(t >> {bits}) & 1;" if out else ""
    return f"{{ u{2 * bits} t = {a} {sign} {b} {sign} {carry}; {w.assign(i.operands[0], 't')} {set_carry} }}"


@opcode("addc", "subc")
def carried(w: Writer, i: Instruction, m: Modifiers) -> str:
    type_, out = m.type(), m.flag("cc")
    return with_carry(w, i, type_, "+" if m.name == "addc" else "-", "carry", out)


@opcode("min", "max")
def extremes(w: Writer, i: Instruction, m: Modifiers) -> str:
    type_ = m.type()
    element = half(type_)[0]
    ftz, nan, relu = m.flag("ftz"), m.flag("NaN"), m.flag("relu")
    if element not in READ:
        template = INTEGER[m.name]
        return compute(w, i, type_, f"larger<{{T}}>({template}, 0)" if relu else template, T=CTYPE[element])
    sign, size = m.flag("xorsign"), m.flag("abs")
    x, y = ("__builtin_fabs({0})", "__builtin_fabs({1})") if size else ("{0}", "{1}")
    name = f"{'least' if m.name == 'min' else 'greatest'}<{CPP_FLOAT[element]}>"
    template = f"{name}({x}, {y}, {yes(nan)})"
    if len(i.operands) == 4:
        template = f"{name}({template}, {{2}}, {yes(nan)})"
    if sign:
        template = f"__builtin_copysign({template}, __builtin_signbit({{0}}) != __builtin_signbit({{1}}) ? -1.0 : 1.0)"
    return compute(w, i, type_, template, ftz, "relu({})" if relu else "{}")


@opcode("copysign")
def copy_sign(w: Writer, i: Instruction, m: Modifiers) -> str:
    type_ = m.type()
    return w.set(
        i.operands[0], type_, f"__builtin_copysign({w.get(i.operands[2], type_)}, {w.get(i.operands[1], type_)})"
    )


@opcode("dp4a", "dp2a")
def short_dots(w: Writer, i: Instruction, m: Modifiers) -> str:
    """9.7.1.23, 9.7.1.24."""
    b_type, a_type = m.type(), m.type()
    a, b, c = (w.get(o, t) for o, t in zip(i.operands[1:], ("b32", "b32", "s32"), strict=True))
    if m.name == "dp4a":
        return w.assign(i.operands[0], f"dot<{a_type[0]}8, {b_type[0]}8>({a}, {b}, {c})")
    high = "16" if m.need("lo", "hi") == "hi" else "0"
    return w.assign(i.operands[0], f"dot<{a_type[0]}16, {b_type[0]}8>({a}, {b} >> {high}, {c})")


# --- 9.7.6, 9.7.7 comparison and selection ------------------------------------------------------------------------
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="} | {
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
UNORDERED = {f"{name}u": symbol for name, symbol in list(COMPARE.items())[:6]}


def compare(name: str, type_: str, a: str, b: str) -> str:
    """9.7.6: with "u" after the name it holds for NaN too."""
    nan = f"__builtin_isunordered({a}, {b})"
    if name in ("num", "nan"):
        return f"({'!' * (name == 'num')}{nan})"
    if name in UNORDERED:
        return f"({nan} || {a} {UNORDERED[name]} {b})"
    return f"({f'!{nan} && ' if name == 'ne' and half(type_)[0] in READ else ''}{a} {COMPARE[name]} {b})"


@opcode("setp", "set")
def comparison(w: Writer, i: Instruction, m: Modifiers) -> str:
    type_ = m.type()
    target = m.type() if m.name == "set" else "pred"
    name, ftz, joined = m.need(*COMPARE, *UNORDERED, "num", "nan"), m.flag("ftz"), m.take("and", "or", "xor")
    element, count = half(type_)
    found = []
    for high in range(count):
        a, b = (w.get(o, element, bool(high)) for o in i.operands[1:3])
        if ftz and element == "f32":
            a, b = f"flush({a})", f"flush({b})"
        found.append(compare(name, type_, a, b))
    both = [found[0], found[1] if count == 2 else f"!{found[0]}"]
    if joined:
        symbol = {"and": "&", "or": "|", "xor": "^"}[joined]
        both = [f"(bool({f}) {symbol} bool({w.get(i.operands[3], 'pred')}))" for f in both]
    if m.name == "setp":
        parts = i.operands[0].parts if i.operands[0].kind == "pair" else (i.operands[0], Operand("sink"))
        return f"{{ bool t = {both[0]}, u = {both[1]}; {w.assign(parts[0], 't')} {w.assign(parts[1], 'u')} }}"
    kind, halves = half(target)
    one = {"f32": "0x3F800000u", "f16": "0x3C00", "bf16": "0x3F80"}.get(kind, "~0u")
    values = [f"({b} ? {one} : 0)" for b in both]
    return w.assign(i.operands[0], f"join32({values[0]}, {values[1]})" if halves == 2 else values[0])


@opcode("selp", "slct")
def selection(w: Writer, i: Instruction, m: Modifiers) -> str:
    by = m.type()
    type_ = m.type() if m.name == "slct" else by
    m.flag("ftz")
    condition = w.get(i.operands[3], "pred") if m.name == "selp" else f"{w.get(i.operands[3], by)} >= 0"
    a, b = (w.raw(o, type_) for o in i.operands[1:3])
    return w.assign(i.operands[0], f"{condition} ? {a} : {b}")


# --- 9.7.9 moving and converting ----------------------------------------------------------------------------------
@opcode("mov")
def move(w: Writer, i: Instruction, m: Modifiers) -> str:
    type_ = m.type()
    to, source = i.operands
    if to.kind != "vector":
        return w.assign(to, w.raw(source, type_))
    bits = 8 * SIZES[type_] // len(to.parts)
    parts = (w.assign(p, f"u{bits}(t >> {n * bits})") for n, p in enumerate(to.parts))
    return f"{{ u64 t = {w.raw(source, type_)}; {' '.join(parts)} }}"


@opcode("cvta")
def to_generic(w: Writer, i: Instruction, m: Modifiers) -> str:
    """9.7.9.20: only the shared window differs from generic addresses."""
    m.type()
    to, space = m.flag("to"), m.need("shared", "shared::cta", "shared::cluster", "global", "local", "const", "param")
    value = w.raw(i.operands[1], "b64")
    if space.startswith("shared"):
        value = f"u32({value})" if to else f"(SHARED_WINDOW | u32({value}))"
    return w.assign(i.operands[0], value)


@opcode("isspacep")
def in_space(w: Writer, i: Instruction, m: Modifiers) -> str:
    inside = f"(u64({w.raw(i.operands[1], 'b64')}) >> 56 == SHARED_WINDOW >> 56)"
    return w.assign(
        i.operands[0], "!" * (m.need("shared", "shared::cta", "shared::cluster", "global") == "global") + inside
    )


@opcode("cvt")
def convert(w: Writer, i: Instruction, m: Modifiers) -> str:
    """9.7.9.21, 9.7.9.22."""
    o = i.operands
    known = [n for n in m.left if n in SIZES or n in ("e4m3x2", "e5m2x2")]
    m.left = [n for n in m.left if n not in known]
    if m.flag("pack"):  # sat.to.from(.b32): c << 16 | a << 8 | b, or a << 16 | b
        m.need("sat")
        to, source = known[:2]
        a, b = (f"u{8 * SIZES[to]}(clamp<{CTYPE[to]}>({w.get(x, source)}))" for x in o[1:3])
        low = f"{w.raw(o[3], 'b32')} << 16 | " if len(o) == 4 else ""
        return w.assign(o[0], f"{low}u32({a}) << {8 * SIZES[to]} | {b}")
    to, source = known
    rounding = m.take("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi") or "rn"
    ftz, sat, relu, finite = m.flag("ftz"), m.flag("sat"), m.flag("relu"), m.flag("satfinite")
    after = "saturate({})" if sat and to in READ else "relu({})" if relu else "{}"
    if half(to)[1] == 2 or half(source)[1] == 2:
        return convert_packed(w, i, to, source, rounding, after, finite)
    value = w.get(o[1], source)
    if ftz and source == "f32":
        value = f"flush({value})"
    if to in READ or to == "tf32":
        return w.assign(o[0], encoded(after.format(value), source, to, rounding, finite, ftz))
    if source in READ:
        wide = source == "f64" or SIZES[to] == 8
        return w.assign(o[0], f"to_integer<{CTYPE[to]}>({value}, {ROUNDINGS[rounding[:2]]}, {yes(wide)})")
    return w.assign(o[0], f"clamp<{CTYPE[to]}>({value})" if sat else f"{CTYPE[to]}({value})")


def encoded(value: str, source: str, to: str, rounding: str, finite: bool = False, ftz: bool = False) -> str:
    """The bits of a value in a floating-point format."""
    if rounding.endswith("i"):  # to an integer in the same format
        value = f"{ {'rni': 'rint', 'rzi': 'trunc', 'rmi': 'floor', 'rpi': 'ceil'}[rounding] }_of({value})"
        rounding = "rn"
    widens = SIZES.get(to, 1) >= SIZES.get(source, 4) and source in READ
    if to == "f64" or to == "f32" and (rounding == "rn" or widens):
        return f"b({'flush' if ftz else ''}({'double' if to == 'f64' else 'float'}({value})))"
    if to in ("f16", "bf16") and rounding == "rn" and not finite and source in ("f32", "f16", "bf16"):
        return f"to_{to}({value})"
    bits = f"encode<{to.upper()}>({value}, {ROUNDINGS[rounding]}, {yes(finite)})"
    return f"{bits} << 13" if to == "tf32" else bits


def convert_packed(w: Writer, i: Instruction, to: str, source: str, rounding: str, after: str, finite: bool) -> str:
    o = i.operands
    if source in ("e4m3x2", "e5m2x2"):
        values = [f"decode<{source[:-2].upper()}>({w.raw(o[1], 'b16')} >> {shift} & 255)" for shift in (0, 8)]
        from_type = "f16"
    elif half(source)[1] == 2:
        from_type = half(source)[0]
        values = [w.get(o[1], from_type, high) for high in (False, True)]
    else:  # the first source goes to the upper half
        from_type = source
        values = [w.get(o[2], source), w.get(o[1], source)]
    low, high = (encoded(after.format(v), from_type, half(to)[0], rounding, finite) for v in values)
    return w.assign(o[0], f"{low} | {high} << 8" if to in ("e4m3x2", "e5m2x2") else f"join32({low}, {high})")


# --- 9.7.12 control flow ------------------------------------------------------------------------------------------
@opcode("bra")
def branch(w: Writer, i: Instruction, m: Modifiers) -> str:
    m.flag("uni")
    return f"goto {i.operands[0].name};"


@opcode("brx")
def indexed_branch(w: Writer, i: Instruction, m: Modifiers) -> str:
    m.need("idx")
    m.flag("uni")
    labels = w.function.tables[i.operands[1].name]
    return (
        f"switch ({w.raw(i.operands[0], 'b32')}) {{ {' '.join(f'case {n}: goto {x};' for n, x in enumerate(labels))} }}"
    )


@opcode("ret", "exit")
def leave(w: Writer, i: Instruction, m: Modifiers) -> str:
    m.flag("uni")
    if m.name == "exit" and not w.function.is_entry:
        raise EmulationError(f"{m.where}: exit is modelled in kernels alone")
    return "return;"


@opcode("call")
def call(w: Writer, i: Instruction, m: Modifiers) -> str:
    """9.7.12.5, of functions of the same module."""
    m.flag("uni")
    results = i.operands[0].parts if i.operands[0].kind == "vector" else ()
    name, *arguments = i.operands[1:] if results else i.operands
    if name.name == cpp_name("__assertfail"):
        return f'trap(self, "a device-side assertion failed", {i.line});'
    if name.name not in {cpp_name(f.name) for f in w.module.functions if not f.is_entry}:
        raise EmulationError(f"{m.where}: only functions of the same module can be called")
    passed = [p.name for p in (*results, *(arguments[0].parts if arguments else ()))]
    return f"{name.name}({', '.join(['self', *passed])});"


@opcode("trap", "brkpt")
def stop(w: Writer, i: Instruction, m: Modifiers) -> str:
    return f'trap(self, "{m.name}", {i.line});'


@opcode("pmevent", "setmaxnreg", "griddepcontrol", "nanosleep", "createpolicy", "prefetch", "prefetchu", "discard",
        "applypriority", "fence", "membar")  # fmt: skip
def without_effect(w: Writer, i: Instruction, m: Modifiers) -> str:
    """Hints about time, registers and caches; fences, since memory is one and one thread runs at a time."""
    m.left.clear()
    return w.assign(i.operands[0], "0") if m.name == "createpolicy" else "nap(self);" if m.name == "nanosleep" else ";"
