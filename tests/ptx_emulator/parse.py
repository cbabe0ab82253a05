"""PTX text to a module of functions, each a list of instructions whose names are resolved.

The grammar is that of the PTX ISA 9.0, chapters 4 "Syntax" and 5 "State Spaces, Types, and Variables". Registers,
labels and variables become names that are unique in their function and valid in C++, so that scopes in braces, as
inline assembly makes them, are gone after parsing.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple


class EmulationError(RuntimeError):
    """PTX that the emulator does not know, or a kernel that does something it must not."""


# Bytes of a value: 5.2 "Types".
SIZES = {f"{k}{n}": n // 8 for k in "bsu" for n in (8, 16, 32, 64)}
SIZES |= {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "tf32": 4}
SIZES |= {f"{t}x2": 4 for t in ("f16", "bf16", "s16", "u16")}


class Operand(NamedTuple):
    """kind: "register", "label" or "symbol" (a variable or function; name: in C++), "number" (name: its text),
    "special" (%tid.x), "vector" ({a, b}), "memory" ([a + offset]; parts: a, and coordinates of a tensor), "pair" (a|b),
    "sink" (_)."""

    kind: str
    name: str = ""
    parts: tuple[Operand, ...] = ()
    offset: int = 0
    negated: bool = False


class Instruction(NamedTuple):
    line: int
    opcode: str  # "": a label
    operands: tuple[Operand, ...]
    predicate: Operand | None = None


class Variable(NamedTuple):
    """A variable or parameter; data: its initial value as bytes, where (symbol, offset) stands for 8 of them."""

    name: str
    ptx_name: str
    space: str
    align: int
    size: int
    data: tuple[int | tuple[str, int], ...] | None = None
    extern: bool = False


@dataclass
class Function:
    name: str
    is_entry: bool
    params: list[Variable]
    results: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)  # name in C++ -> type
    variables: list[Variable] = field(default_factory=list)  # .local, .shared and .param of the body
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets: label -> labels
    body: list[Instruction] = field(default_factory=list)
    required: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # "reqntid", "reqnctapercluster"


@dataclass
class Module:
    functions: list[Function]
    variables: list[Variable]
    lines: list[str]


class Scope(dict[str, Operand]):
    """Names in a pair of braces, and of those around it."""

    def __init__(self, parent: Scope | None) -> None:
        super().__init__()
        self.parent = parent

    def find(self, name: str) -> Operand | None:
        return self[name] if name in self else self.parent.find(name) if self.parent is not None else None


_IGNORED = re.compile(
    r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:loc|file|version|target|address_size)\b[^\n;]*", re.DOTALL | re.MULTILINE
)
_TOP = re.compile(r"\s*((?:\.(?:extern|visible|weak|common)\s+)*)\.(entry|func|shared|global|const|section|pragma)\b")
_HEADER = re.compile(r"\s*(?:\(([^()]*)\))?\s*([\w$]+)\s*(?:\(([^()]*)\))?([^{;]*)")
_BODY_ITEM = re.compile(r"\s*(?:([\w$%]+)\s*:(?!:)|([{}])|([^;{}]+(?:\{[^{}]*\}[^;{}]*)*);)")
_VARIABLE = re.compile(
    r"\s*\.(reg|local|shared|global|const|param)\b((?:\s*\.(?:align\s+\d+|attribute\([^)]*\)))*)\s*(?:\.v([248])\s*)?"
    r"\.(\w+)\s*(?:\.ptr(?:\s*\.(?:global|shared|const|local|align\s+\d+))*)?\s*(.*)",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"[+-]?(?:0[xX][0-9a-fA-F]+|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d*(?:[eE][+-]?\d+)?|\d+)U?"
)
_ADDRESS = re.compile(r"([\w$%.]+?)\s*(?:\+\s*(-?\s*\w+)|(-\s*\w+))?")


def cpp_name(name: str) -> str:
    """A name that C++ takes."""
    return "p_" + re.sub(r"\W", "_", name.replace("%", "R").replace("$", "S"))


def split(text: str, separator: str = ",") -> list[str]:
    """Parts of a list, where brackets of any kind keep theirs together."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[\[\](){}" + re.escape(separator) + "]", text):
        if match[0] == separator:
            if depth == 0:
                parts.append(text[start : match.start()].strip())
                start = match.end()
        else:
            depth += 1 if match[0] in "[({" else -1
    parts.append(text[start:].strip())
    return parts if parts != [""] else []


def immediate(text: str, kind: str) -> int:
    """4.5 "Constants": the bits of a literal in a register of type `kind`."""
    sign, plain = text.startswith("-"), text.lstrip("+-").rstrip("U")
    form = {"f32": "<f", "f64": "<d"}.get(kind, "<d")
    if plain[:2].lower() == "0f" or plain[:2].lower() == "0d" or "." in plain:
        if "." in plain:
            value = float(plain)
        else:
            value = struct.unpack(
                "<f" if len(plain) == 10 else "<d", int(plain[2:], 16).to_bytes(len(plain) // 2 - 1, "little")
            )[0]
            if SIZES[kind] == len(plain) // 2 - 1 and not sign:
                return int(plain[2:], 16)  # a NaN keeps its bits
        return int.from_bytes(struct.pack(form, -value if sign else value), "little")
    value = int(plain, 8) if re.fullmatch(r"0\d+", plain) else int(plain, 0)
    return (-value if sign else value) & ((1 << 8 * SIZES[kind]) - 1)


class Parser:
    def __init__(self, text: str) -> None:
        self.text = _IGNORED.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
        self.module = Module([], [], text.splitlines())
        self.breaks = [m.start() for m in re.finditer("\n", text)]
        self.globals = Scope(None)
        self.count = 0

    def error(self, at: int, why: str) -> EmulationError:
        line = self.line(at)
        return EmulationError(f"line {line}: {why}: {self.module.lines[line - 1].strip()}")

    def line(self, at: int) -> int:
        return bisect_right(self.breaks, at - 1) + 1

    def closing(self, at: int) -> int:
        """The position of the brace that closes the one at `at`."""
        depth = 0
        for match in re.compile(r'[{}]|"[^"]*"').finditer(self.text, at):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return match.start()
        raise self.error(at, "a brace is not closed")

    def parse(self) -> Module:
        at = 0
        while self.text[at:].strip():
            match = _TOP.match(self.text, at)
            if match is None:
                raise self.error(at + len(self.text[at:]) - len(self.text[at:].lstrip()), "cannot be read")
            if match[2] == "section":  # of debug information
                at = self.closing(self.text.index("{", at)) + 1
            elif match[2] in ("entry", "func"):
                at = self._function(match.end(), match[2] == "entry")
            else:
                end = self.text.index(";", at)
                if match[2] != "pragma":
                    self.module.variables += self._variables(
                        self.text[match.start(2) - 1 : end], self.globals, at, "extern" in match[1]
                    )
                at = end + 1
        return self.module

    def _function(self, at: int, is_entry: bool) -> int:
        header = _HEADER.match(self.text, at)
        assert header is not None
        results, name, params, directives = header.groups(default="")
        scope = Scope(self.globals)
        self.globals[name] = Operand("symbol", cpp_name(name))
        lists = [[v for p in split(part) for v in self._variables(p, scope, at)] for part in (params, results)]
        if self.text[header.end()] == ";":  # declared only
            return header.end() + 1
        function = Function(name, is_entry, lists[0], lists[1])
        for key in ("reqntid", "reqnctapercluster"):
            if match := re.search(rf"\.{key}\s+([\d,\s]+)", directives):
                x, y, z = ([int(n) for n in match[1].split(",")] + [1, 1])[:3]
                function.required[key] = (x, y, z)
        self.module.functions.append(function)
        end = self.closing(header.end())
        self._body(function, scope, header.end() + 1, end)
        return end + 1

    def _variables(self, text: str, scope: Scope, at: int, extern: bool = False) -> list[Variable]:
        """5.4 "Variables"."""
        match = _VARIABLE.fullmatch(text)
        if match is None or match[4] not in SIZES:
            raise self.error(at, f"the declaration {' '.join(text.split())!r} cannot be read")
        space, attributes, vector, kind, rest = match.groups()
        element = SIZES[kind] * int(vector or 1)
        align = re.search(r"\.align\s+(\d+)", attributes)
        found = []
        for part in split(rest):
            name, _, value = (s.strip() for s in part.partition("="))
            size = element
            for n in re.findall(r"\[\s*(\d*)\s*\]", name):
                size *= int(n or 0)
            name = name.split("[")[0].strip()
            self.count += 1
            unique = cpp_name(name) if scope is self.globals else f"{cpp_name(name)}_{self.count}"
            data = self._initial(value, kind) if value else None
            scope[name] = Operand("symbol", unique)
            found.append(Variable(unique, name, space, int(align[1]) if align else element, size, data, extern))
        return found

    def _initial(self, text: str, kind: str) -> tuple[int | tuple[str, int], ...]:
        """5.4.4 "Initializers"."""
        data: list[int | tuple[str, int]] = []
        for item in filter(None, re.sub(r"[{}\s]", "", text).split(",")):
            if _NUMBER.fullmatch(item):
                data += immediate(item, kind).to_bytes(SIZES[kind], "little")
            else:
                name, _, offset = re.sub(r"generic\((.*)\)", r"\1", item).partition("+")
                data.append((cpp_name(name), int(offset or 0)))
        return tuple(data)

    def _body(self, function: Function, scope: Scope, at: int, end: int) -> None:
        """First every name, since a label may be used before it comes; then the instructions."""
        found: list[tuple[int, str, Scope]] = []
        while match := _BODY_ITEM.match(self.text, at, end):
            label, brace, text = match.groups()
            start, at = match.start(match.lastindex or 0), match.end()
            if label:
                self.count += 1
                scope[label] = Operand("label", f"L{self.count}")
                found.append((start, label + ":", scope))
            elif brace == "{":
                scope = Scope(scope)
            elif brace:
                assert scope.parent is not None
                scope = scope.parent
            elif text.startswith(".reg"):
                self._registers(function, scope, text, start)
            elif re.match(r"\.(local|shared|param|global|const)\b", text):
                home = self.module if re.match(r"\.(global|const)\b", text) else function
                home.variables += self._variables(text, scope, start)
            elif not text.startswith(".pragma"):
                found.append((start, text, scope))
        if self.text[at:end].strip():
            raise self.error(at + 1, "cannot be read")
        for start, text, scope in found:
            if text.startswith(".branchtargets"):
                labels = [self._operand(n, scope, start).name for n in split(text[len(".branchtargets") :])]
                function.tables[function.body[-1].operands[0].name] = labels
            elif text.endswith(":"):
                function.body.append(Instruction(self.line(start), "", (scope[text[:-1]],)))
            else:
                function.body.append(self._instruction(start, text, scope))

    def _registers(self, function: Function, scope: Scope, text: str, at: int) -> None:
        """5.4.6 "Parameterized Variable Names": %r<4> declares %r0 .. %r3."""
        match = _VARIABLE.fullmatch(text)
        if match is None or match[4] not in SIZES:
            raise self.error(at, "these registers cannot be read")
        self.count += 1
        for part in split(match[5]):
            ranged = re.fullmatch(r"([\w$%]+)\s*<\s*(\d+)\s*>", part)
            for name in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [part]:
                unique = f"{cpp_name(name)}_{self.count}"
                scope[name] = Operand("register", unique)
                function.registers[unique] = match[4]

    def _instruction(self, at: int, text: str, scope: Scope) -> Instruction:
        predicate = None
        if text.startswith("@"):
            guard, text = text[1:].split(None, 1)
            predicate = self._operand(guard, scope, at)
        opcode, rest = (text.split(None, 1) + [""])[:2]
        return Instruction(self.line(at), opcode, tuple(self._operand(o, scope, at) for o in split(rest)), predicate)

    def _operand(self, text: str, scope: Scope, at: int) -> Operand:
        """6 "Instruction Operands"."""
        if text.startswith("!"):
            return self._operand(text[1:].strip(), scope, at)._replace(negated=True)
        if text[0] in "{(":
            return Operand("vector", parts=tuple(self._operand(p, scope, at) for p in split(text[1:-1])))
        if text[0] == "[":
            first, *rest = (self._operand(p, scope, at) for p in split(text[1:-1]))
            return Operand("memory", parts=(first._replace(offset=0), *rest), offset=first.offset)
        if "|" in text:
            return Operand("pair", parts=tuple(self._operand(p.strip(), scope, at) for p in text.split("|")))
        if text == "_":
            return Operand("sink")
        if _NUMBER.fullmatch(text):
            return Operand("number", text)
        found = scope.find(text)
        if found is not None:
            return found
        match = _ADDRESS.fullmatch(text)
        if match is not None and (match[2] or match[3]):
            return self._operand(match[1], scope, at)._replace(offset=int((match[2] or match[3]).replace(" ", ""), 0))
        if text.startswith("%"):
            return Operand("special", text)
        raise self.error(at, f"{text!r} is not declared")


def parse(text: str) -> Module:
    """Read a module of PTX.

    Raises:
        EmulationError: something cannot be read; the message has the line.
    """
    return Parser(text).parse()
