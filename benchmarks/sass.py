"""What the inner loop of a compiled kernel executes, counted in the disassembly (NVIDIA SASS, AMD assembly).

Which loop, and which way round it:

- The program is cut into basic blocks; a loop is what a backward branch to a dominating block closes.
- A matrix loop contains matrix instructions, and no loop within it does.
- Once round it is the path from its first block back to it with the most matrix instructions and, among those, the
  fewest instructions: what is skipped unless something rare happens (values that are not finite, a wait that is not
  over yet) is left out.
- Of several matrix loops the one with the most matrix instructions is reported (one that only recomputes scores, for
  what happens rarely, has fewer) and, among equals, the one with the fewest others: tiles without masks, where a long
  problem spends its time.

A kernel whose matrix products are float32 in IEEE arithmetic has no matrix instructions; its loops are found by their
fused multiply-adds instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Instruction(NamedTuple):
    """op: the mnemonic. target: where a branch goes, by position. falls: whether the next instruction may follow."""

    op: str
    target: int | None = None
    falls: bool = True


class Loop(NamedTuple):
    """Instructions once round a matrix loop, by mnemonic: of each warp, and of the one warp that issues tcgen05."""

    each_warp: Counter[str]
    one_warp: Counter[str]


_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?);")
_SASS_LEAVES = re.compile(r"EXIT|RET|BRX|JMX|KILL")
_AMD_LINE = re.compile(r"^\s+([a-z]+_\w+)\s*([^;]*)")

_MATRIX = re.compile(r"HMMA|IMMA|DMMA|QMMA|OMMA|[HIQ]GMMA|UTC[A-Z]*MMA|v_mfma|v_smfmac|v_wmma")
_MULTIPLY_ADD = re.compile(r"FFMA|v_fmac?_f32|v_pk_fma_f32")
# The kinds are disjoint; the first that matches counts.
_KINDS = (
    ("matrix", _MATRIX),
    ("exp2", re.compile(r"MUFU\.EX2|v_exp_f32")),
    ("special", re.compile(r"MUFU|(F2F|I2F|F2I)(?!P)|FRND|v_(rcp|rsq|log|sqrt|sin|cos)_")),
    ("fma", re.compile(r"FFMA|FMUL|FADD|H(FMA|ADD|MUL)2|IMAD|IDP|v_(pk_)?(fma|fmac|mul|add|sub|mad)\w*_f(16|32)")),
    ("memory", re.compile(r"LD|ST|ATOM|RED|SHFL|UTMA|UBLK|SYNCS|ds_|buffer_|global_|flat_|scratch_|s_load")),
    ("other", re.compile(r"U|BAR|NOP|BRA|BRX|BSSY|BSYNC|CALL|DEPBAR|FENCE|MEMBAR|WARP|EXIT|ELECT|ERRBAR|CCTL|s_")),
    ("alu", re.compile(r"")),  # what is left: integers, comparisons, selections, moves, conversions
)


def kind(op: str) -> str:
    """ "matrix", "exp2", "special" (other functions of the special unit), "fma", "alu", "memory" or "other"."""
    return next(name for name, pattern in _KINDS if pattern.match(op))


def kinds(counts: Counter[str]) -> Counter[str]:
    """Counts by mnemonic added up by kind."""
    found: Counter[str] = Counter()
    for op, n in counts.items():
        found[kind(op)] += n
    return found


def read_sass(text: str) -> list[Instruction]:
    """The program in what `cuobjdump -sass` prints."""
    rows = [(int(m[1], 16), m[2], m[3], m[4]) for m in _SASS.finditer(text)]
    position = {address: i for i, (address, *_) in enumerate(rows)}
    program = []
    for _, guard, op, operands in rows:
        target = None
        conditional = guard is not None or op.startswith("BRA.") or op == "CALL"
        if op.startswith(("BRA", "CALL")):
            addresses = re.findall(r"0x[0-9a-f]+", operands)
            target = position.get(int(addresses[-1], 16)) if addresses else None
            # A call may come back; an unconditional branch does not. "BRA.U UP0, x" is guarded by its operand, and
            # "BRA.DIV ~URZ, x" is taken by a warp whose threads have parted.
            may_fall = op.startswith(("CALL", "BRA.DIV", "BRA.CONV"))
            conditional = guard is not None or may_fall or bool(re.match(r"!?U?P\d", operands))
        falls = conditional or not (op.startswith("BRA") or _SASS_LEAVES.match(op))
        program.append(Instruction(op, target, falls))
    return program


def read_amd(text: str) -> list[Instruction]:
    """The program in AMD's assembly, as Triton's `amdgcn`."""
    labels: dict[str, int] = {}
    rows: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(rows)
        elif line.startswith(".Lfunc_end"):
            break
        elif row := _AMD_LINE.match(line):
            rows.append((row[1], row[2]))
    program = []
    for op, operands in rows:
        branches = op == "s_branch" or op.startswith("s_cbranch")
        falls = op not in ("s_branch", "s_endpgm", "s_setpc_b64")
        program.append(Instruction(op, labels.get(operands.strip()) if branches else None, falls))
    return program


class _Graph:
    """Basic blocks of a program, their order, dominators and loops."""

    def __init__(self, program: list[Instruction]) -> None:
        starts = {0} | {i.target for i in program if i.target is not None}
        starts |= {n + 1 for n, i in enumerate(program) if i.target is not None or not i.falls}
        cuts = sorted(s for s in starts if s < len(program)) + [len(program)]
        self.blocks = [program[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        at = {start: n for n, start in enumerate(cuts[:-1])}
        self.next: list[list[int]] = []
        for n, block in enumerate(self.blocks):
            last = block[-1]
            after = [at[last.target]] if last.target is not None else []
            self.next.append(after + ([n + 1] if last.falls and n + 1 < len(self.blocks) else []))
        self.before: list[list[int]] = [[] for _ in self.blocks]
        for n, after in enumerate(self.next):
            for m in after:
                self.before[m].append(n)
        self._order()
        self._dominators()
        self.loops = self._loops()

    def _order(self) -> None:
        """Reverse postorder from every block that nothing leads to (the entry, targets of indirect branches)."""
        seen: set[int] = set()
        post: list[int] = []
        roots = [n for n in range(len(self.blocks)) if n == 0 or not self.before[n]]
        for root in reversed(roots):
            stack = [] if root in seen else [(root, iter(self.next[root]))]
            seen.add(root)
            while stack:
                n, rest = stack[-1]
                m = next((m for m in rest if m not in seen), None)
                if m is None:
                    post.append(n)
                    stack.pop()
                else:
                    seen.add(m)
                    stack.append((m, iter(self.next[m])))
        self.order = post[::-1]
        self.rank = {n: i for i, n in enumerate(self.order)}

    def _dominators(self) -> None:
        everything = set(self.order)
        self.dominators = {n: set(everything) if self.before[n] and n else {n} for n in self.order}
        changed = True
        while changed:
            changed = False
            for n in self.order:
                if not self.before[n] or n == 0:
                    continue
                new = set.intersection(*(self.dominators[m] for m in self.before[n] if m in self.rank)) | {n}
                if new != self.dominators[n]:
                    self.dominators[n], changed = new, True

    def _loops(self) -> dict[int, set[int]]:
        """Natural loops by their first block."""
        loops: dict[int, set[int]] = {}
        for n in self.order:
            for head in self.next[n]:
                if head not in self.dominators[n]:
                    continue
                body = loops.setdefault(head, {head})
                todo = [n]
                while todo:
                    m = todo.pop()
                    if m not in body:
                        body.add(m)
                        todo += [k for k in self.before[m] if k in self.rank]
        return loops

    def count(self, n: int, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(i.op)) for i in self.blocks[n])

    def way_round(self, head: int, pattern: re.Pattern[str]) -> list[int]:
        """The blocks once round a loop: the most matrix instructions, then the fewest instructions."""
        body = self.loops[head]
        best: dict[int, tuple[tuple[int, int], list[int]]] = {}
        for n in sorted(body, key=self.rank.__getitem__):
            reached = (
                [best[m] for m in self.before[n] if m in best and self.rank[m] < self.rank[n]] if n != head else []
            )
            if n != head and not reached:
                continue
            score, path = max(reached, key=lambda r: r[0], default=((0, 0), []))
            gain = (score[0] + self.count(n, pattern), score[1] - len(self.blocks[n]))
            best[n] = (gain, [*path, n])
        ends = [best[n] for n in self.before[head] if n in best and n in body]
        return max(ends, key=lambda r: r[0])[1]


def _added(blocks: Iterable[list[Instruction]]) -> Counter[str]:
    return Counter(i.op for block in blocks for i in block)


def matrix_loop(program: list[Instruction]) -> Loop | None:
    """Once round the inner loop that does the matrix products, as the top of this file defines it; None without one."""
    pattern = _MATRIX if any(_MATRIX.match(i.op) for i in program) else _MULTIPLY_ADD
    graph = _Graph(program)
    busy = {head for head, body in graph.loops.items() if any(graph.count(n, pattern) for n in body)}
    inner = [h for h in busy if not any(o != h and o in graph.loops[h] for o in busy)]
    found: list[tuple[tuple[int, int], Loop]] = []
    for head in inner:
        path = graph.way_round(head, pattern)
        alone = [n for n in path if any(i.op.startswith("UTC") and "MMA" in i.op for i in graph.blocks[n])]
        each, one = ([graph.blocks[n] for n in path if (n in alone) is lonely] for lonely in (False, True))
        matrix = sum(graph.count(n, pattern) for n in path)
        found.append(((-matrix, sum(map(len, each + one))), Loop(_added(each), _added(one))))
    return min(found, key=lambda f: f[0])[1] if found else None
