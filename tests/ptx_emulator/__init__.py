"""Runs compiled PTX on a CPU: kernels of `nvcc -ptx` and of Triton, unchanged, on NumPy arrays or CPU tensors.

    module = load(text)                                   # parse, translate to C++, compile with g++ (kept on disk)
    report = module.launch("kernel", grid=(4, 2), block=128, args=[a, b, 3, 0.5], shared=49152, seed=1)
    assert not report.races

How it works. `parse.py` reads a module, `translate.py` writes each function as C++: registers become locals, branches
gotos, an instruction one statement; the `operations_*.py` have a function per opcode. `module.py` compiles that, packs
arguments and launches. The runtime in `cpp/` gives every thread a fiber: `machine.h` and `launch.cpp` the schedule,
`memory.h` bounds, races and banks, `warp.h` collectives and barriers, `matrix.h` mma and wgmma, `asynchronous.h`
cp.async, mbarriers and TMA, `numbers.h` formats and rounding. An opcode or modifier that nobody wrote down is an error
when the module is loaded.

What makes a mistake show:

- The seed chooses which thread runs, and when another one takes over: at barriers, collectives and memory operations.
  Threads of a warp are not in step.
- Registers and shared memory start as all ones, which is NaN. So do the destination of an asynchronous copy until it
  completes and the accumulators of a wgmma until its wait. When copies, bulk stores and products happen within what the
  waits allow is the seed's choice too.
- Accesses to shared memory that no barrier, `bar.warp.sync`, mbarrier or wait orders are reported as races, also where
  the schedule kept them apart by chance; a shuffle orders nothing. Two stores of one value are no race.
- Bank conflicts of ld, st, ldmatrix, stmatrix and cp.async are counted.
- Errors, with thread and PTX line: addresses out of the memory of the arguments, misaligned ones, wrong use of an
  mbarrier, a deadlock (with what every warp waits for), a spin that no other thread ends.

What is not modelled:

- Speed, register allocation, and what ptxas does: its scheduling, and where it would serialise wgmma.
- Fences: memory is one here. A missing `fence.proxy.async`, `wgmma.fence`, `fence.mbarrier_init` or `membar` does not
  show, nor does weak memory beyond what the race detector sees. Races in global memory are not looked for.
- The last bits of `.approx` instructions (they are exact to rounding here) and the order in which the hardware adds
  products: here one after the other in float32, in rising k.
- Bank conflicts of wgmma and TMA; that a bulk store reads its source before it writes (here it does both at once).
- Several CTAs at a time: they run one after the other in launch order (those of a cluster together), so a CTA must not
  wait for a later one. Volatile, relaxed and atomic accesses are not checked for races.
- `activemask` names the calling thread alone, `elect.sync` the lowest thread; `%clock` and timers only count up.
- Opcodes of sm_100 (tcgen05, tensor memory), textures, surfaces, printf, indirect calls, im2col tensor maps.

From a shell: `python -m tests.ptx_emulator kernel.ptx --help`.
"""

from .module import BankConflicts, Module, Report, load, pointer
from .parse import EmulationError
from .tensor_map import TensorMap

__all__ = ["BankConflicts", "EmulationError", "Module", "Report", "TensorMap", "load", "pointer"]
