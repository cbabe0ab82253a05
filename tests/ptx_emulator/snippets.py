"""PTX around a few instructions, for tests: every thread loads operands, runs them, stores results."""

from __future__ import annotations

from collections.abc import Sequence

from .parse import SIZES

HEAD = ".version 8.7\n.target {target}\n.address_size 64\n"


def register_of(type_: str) -> str:
    """The type of a register that holds a value of `type_`."""
    return f".b{max(16, 8 * SIZES[type_])}"


def snippet(body: str, inputs: Sequence[str] = (), outputs: Sequence[str] = (), values: Sequence[str] = (),
            shared: int = 0, target: str = "sm_90a") -> str:  # fmt: skip
    """A kernel `test`, whose parameters are arrays for inputs and outputs, then 64-bit values.

    Thread t of its block finds element t of the inputs, whose types are given, in %a0, %a1, ...; what `body` leaves in
    %d0, %d1, ... becomes element t of the outputs. Values are in %v0, ... ("map": %v is the address of a tensor map).
    %t is the thread, %i<8>, %l<8>, %f<8>, %h<8>, %p<8> are free; shared memory begins at `tile`.
    """
    params = [f".param .u64 {kind}{n}" for kind, types in (("in", inputs), ("out", outputs)) for n in range(len(types))]
    params += [f".param .align 64 .b8 v{n}[128]" if v == "map" else f".param .u64 v{n}" for n, v in enumerate(values)]
    lines = [
        ".reg .b32 %t, %i<8>;",
        ".reg .b64 %x, %y, %l<8>;",
        ".reg .f32 %f<8>;",
        ".reg .b16 %h<8>;",
        ".reg .pred %p<8>;",
    ]
    lines += ["mov.u32 %t, %tid.x;", "cvt.u64.u32 %y, %t;"]
    for n, v in enumerate(values):
        lines.append(f".reg .b64 %v{n};")
        lines.append(f"mov.b64 %v{n}, v{n};" if v == "map" else f"ld.param.u64 %v{n}, [v{n}];")
    for n, type_ in enumerate(inputs):
        lines += [f".reg {register_of(type_)} %a{n};", f"ld.param.u64 %x, [in{n}];",
                  f"mad.lo.u64 %x, %y, {SIZES[type_]}, %x;", f"ld.global.b{8 * SIZES[type_]} %a{n}, [%x];"]  # fmt: skip
    lines += [f".reg {register_of(type_)} %d{n};" for n, type_ in enumerate(outputs)]
    lines.append(body)
    for n, type_ in enumerate(outputs):
        lines += [f"ld.param.u64 %x, [out{n}];", f"mad.lo.u64 %x, %y, {SIZES[type_]}, %x;",
                  f"st.global.b{8 * SIZES[type_]} [%x], %d{n};"]  # fmt: skip
    storage = f".shared .align 1024 .b8 tile[{shared}];\n" if shared else ""
    head = HEAD.format(target=target) + storage
    return head + f".visible .entry test(\n{', '.join(params)}\n)\n{{\n" + "\n".join(lines) + "\nret;\n}\n"
