"""Builds fused_attention._C with pybind11 and ninja. PyTorch is not needed here: the extension takes numbers
and pointers, so it has no PyTorch ABI to match.

Environment:
  CXX                           the C++ compiler (default: the first of g++, c++, clang++)
  CXXFLAGS                      appended to every compilation
  MAX_JOBS                      parallel compilations (default: ninja's)
  FUSED_ATTENTION_CUDA          1: build the CUDA kernels or fail; 0: leave them out (default: if there is an nvcc)
  FUSED_ATTENTION_CUDA_ARCHS    what they are compiled for, such as "80;86;120" (default: 80, which serves sm_86 and
                                sm_89 too, and 90a where nvcc knows it)
  CUDACXX                       the CUDA compiler (default: nvcc on the path, or in CUDA_HOME/bin)
  FUSED_ATTENTION_REQUIRE_EXT   1: a build without the extension is an error instead of a note
  FUSED_ATTENTION_SANITIZE      such as "address,undefined": build with these sanitizers
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

COMMON_FLAGS = [
    *("-std=gnu++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Errno, trapping and separate rounding of a * b + c would keep the compiler from vectorising. What is NOT
    # here: -ffast-math. Infinities and NaN carry meaning (hidden keys, dead rows).
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
]

CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

# kernels.cpp is compiled once for each of these; dispatch.cpp chooses among them by cpuid.
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
]
KERNEL_ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-DFA_PRODUCTS=3"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DFA_PRODUCTS=1"],
    # The same source with the matrix unit in plain C++, for tests on any processor: taken only when asked for by name.
    "amx_emulated": ["-DFA_PRODUCTS=2", "-Wno-psabi"],
}

# Written into the package, and read by its backends, when there is no extension: why there is none.
NOTE = "_C_missing.txt"


class BuildError(Exception):
    """Why the extension cannot be built, in one line."""


class Unit(NamedTuple):
    """One compilation: a source may appear in several, with other flags."""

    source: str
    object: str
    flags: list[str]
    rule: str = "compile"


class Cuda(NamedTuple):
    """The CUDA compiler, what to compile for, and where its headers and libraries are."""

    compiler: list[str]
    archs: list[str]
    version: str
    include: Path
    library: Path  # the static runtime


# Those that run on every chip from sm_80 on, and those that need what sm_90a alone has.
CUDA_KERNELS = ["forward_sm80", "key_gradient_sm80", "query_gradient_sm80", "decode_sm80"]
HOPPER_KERNELS = ["forward_sm90", "forward_fp8_sm90", "quantise_sm90", "key_gradient_sm90", "query_gradient_sm90"]


def find_compiler() -> list[str]:
    asked = os.environ.get("CXX")
    for candidate in [asked] if asked else ["g++", "c++", "clang++"]:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found ({f'CXX={asked}' if asked else 'tried g++, c++, clang++'})")


def accepts(compiler: list[str], flags: list[str], code: str = "") -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=code, text=True, capture_output=True).returncode == 0


def find_cuda() -> Cuda | None:
    """nvcc, where CUDA kernels are wanted and it is there; says so in one line where it is not.

    Raises:
        BuildError: FUSED_ATTENTION_CUDA=1 and the kernels cannot be built.
    """
    wanted = os.environ.get("FUSED_ATTENTION_CUDA", "")
    if wanted == "0":
        return None
    try:
        return _find_cuda()
    except BuildError as error:
        if wanted == "1":
            raise
        say(f"built without CUDA kernels: {error}")
        return None


def _find_cuda() -> Cuda:
    asked = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [asked] if asked else ["nvcc", *([str(Path(home, "bin", "nvcc"))] if home else [])]
    compiler = next((c for c in map(shlex.split, candidates) if shutil.which(c[0])), None)
    if compiler is None:
        raise BuildError(f"no CUDA compiler found (tried {', '.join(candidates)})")
    asked_archs = os.environ.get("FUSED_ATTENTION_CUDA_ARCHS", "").replace(",", ";")
    choices = [[a.strip() for a in asked_archs.split(";")]] if asked_archs else [["80", "90a"], ["80"]]
    for archs in choices:
        dry = [*compiler, *arch_flags(archs), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        told = subprocess.run(dry, capture_output=True, text=True)
        if not told.returncode:
            break
    settings = dict(
        line[3:].split("=", 1) for line in told.stderr.splitlines() if line.startswith("#$ ") and "=" in line
    )
    if told.returncode or "TOP" not in settings:
        reason = (told.stderr.strip().splitlines() or ["it says nothing of itself"])[-1]
        raise BuildError(f"{shlex.join(compiler)} does not compile for {';'.join(archs)}: {reason}")
    target = Path(settings["TOP"].strip(), settings.get("_TARGET_DIR_", "").strip()).resolve()
    folders = [folder / name for folder in (target, target.parents[1]) for name in ("lib", "lib64")]
    library = next((f / "libcudart_static.a" for f in folders if (f / "libcudart_static.a").exists()), None)
    if library is None or not (target / "include" / "cuda_runtime_api.h").exists():
        raise BuildError(f"no CUDA runtime (headers and libcudart_static.a) in {target}")
    printed = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    version = printed.partition("release ")[2].partition(",")[0] or "unknown"
    return Cuda(compiler, archs, version, target / "include", library)


def arch_flags(archs: list[str]) -> list[str]:
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]


def common_arch_flags(archs: list[str]) -> list[str]:
    """For kernels that every chip runs: on one whose own instructions they do not use they are those of sm_80."""
    own = [arch for arch in archs if arch.isdigit() and arch != "80"]
    codes = ["sm_80"] * ("80" in archs) + [f"sm_{a.rstrip('af')}" for a in archs if not a.isdigit()]
    shared = [f"-gencode=arch=compute_80,code=[{','.join(codes)}]"] if codes else []
    return [*shared, *arch_flags(own)]


def cuda_units(cuda: Cuda) -> list[Unit]:
    hopper = "90a" in cuda.archs
    built = [f"-DFA_CUDA_ARCHS={';'.join(cuda.archs)}", f"-DFA_CUDA_COMPILER=nvcc {cuda.version}"]
    built += ["-DFA_HAVE_SM90=1"] if hopper else []
    kernels = [(name, common_arch_flags(cuda.archs)) for name in CUDA_KERNELS]
    kernels += [(name, arch_flags(["90a"])) for name in HOPPER_KERNELS if hopper]
    return [
        Unit("csrc/cuda/plan.cpp", "cuda_plan.o", []),
        Unit("csrc/cuda/launch.cpp", "cuda_launch.o", ["-isystem", str(cuda.include), *built]),
        *(Unit(f"csrc/cuda/{name}.cu", f"{name}.o", flags, "nvcc") for name, flags in kernels),
    ]


def sanitizer_flags() -> list[str]:
    names = os.environ.get("FUSED_ATTENTION_SANITIZE", "")
    return [f"-fsanitize={names}", "-fno-omit-frame-pointer", "-g", "-O1"] if names else []


def usable_isas(compiler: list[str]) -> dict[str, list[str]]:
    isas = {name: flags for name, flags in KERNEL_ISAS.items() if accepts(compiler, flags)}
    if platform.machine().lower() in ("x86_64", "amd64"):
        for name in KERNEL_ISAS.keys() - isas.keys():
            say(f"{compiler[0]} does not accept the {name} flags: built without {name} kernels")
    return isas


def units(compiler: list[str], cuda: Cuda | None) -> list[Unit]:
    import pybind11

    isas = usable_isas(compiler)
    built = [f"-DFA_HAVE_{name.upper()}=1" for name in isas]
    includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    kernels = [
        Unit("csrc/cpu/kernels.cpp", f"kernels_{name}.o", [f"-DFA_ISA={name}", *flags]) for name, flags in isas.items()
    ]
    return [
        Unit("csrc/bindings.cpp", "bindings.o", [*includes, *(["-DFA_HAVE_CUDA=1"] if cuda else [])]),
        Unit("csrc/cpu/dispatch.cpp", "dispatch.o", built),
        Unit("csrc/cpu/projected.cpp", "projected.o", []),
        Unit("csrc/cpu/threads.cpp", "threads.o", []),
        *kernels,
        *(cuda_units(cuda) if cuda else []),
    ]


def write_ninja_file(path: Path, compiler: list[str], cuda: Cuda | None, library: Path) -> None:
    from ninja import ninja_syntax

    todo = units(compiler, cuda)
    flags = [*COMMON_FLAGS, *sanitizer_flags(), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    with path.open("w") as file:
        writer = ninja_syntax.Writer(file, width=110)
        writer.variable("cxx", shlex.join(compiler))
        writer.variable("flags", shlex.join(flags))
        writer.rule(
            "compile",
            "$cxx -MMD -MF $out.d $flags $unit_flags -c $in -o $out",
            description="compile $out",
            depfile="$out.d",
            deps="gcc",
        )
        writer.rule("link", "$cxx -shared $flags $in $libraries -o $out", description="link $out")
        if cuda:
            writer.rule(
                "nvcc",
                f"{shlex.join(cuda.compiler)} -MD -MF $out.d {shlex.join(CUDA_FLAGS)} $unit_flags -c $in -o $out",
                description="compile $out",
                depfile="$out.d",
                deps="gcc",
            )
        for unit in todo:
            source = ninja_syntax.escape_path(str(ROOT / unit.source))
            writer.build(unit.object, unit.rule, source, variables={"unit_flags": shlex.join(unit.flags)})
        libraries = [str(cuda.library), "-ldl", "-lrt", "-lpthread"] if cuda else []
        objects = [unit.object for unit in todo]
        writer.build(library.name, "link", objects, variables={"libraries": shlex.join(libraries)})


def compile_extension(file_name: str) -> Path:
    """Returns the built library. Incremental: the build folder outlives pip's temporary ones."""
    compiler = find_compiler()
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise BuildError("Python's C headers are not installed (python3-dev or python3-devel)")
    if not accepts(compiler, ["-std=gnu++17", "-fopenmp"], "#include <omp.h>\n#include <vector>\n"):
        raise BuildError(f"{shlex.join(compiler)} does not compile C++17 with OpenMP")

    sanitize = os.environ.get("FUSED_ATTENTION_SANITIZE", "").replace(",", "-")
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder = ROOT / "build" / "-".join(filter(None, ["ninja", tag, sanitize]))
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / file_name
    write_ninja_file(folder / "build.ninja", compiler, find_cuda(), library)

    import ninja

    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *jobs]):
        raise BuildError(f"compilation with {shlex.join(compiler)} failed (its messages: pip install -v)")
    return library


def say(line: str) -> None:
    print(f"fused-attention: {line}", file=sys.stderr, flush=True)


class NinjaBuild(build_ext):
    """Puts the library in the package or, when it cannot be built, a note saying why."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        note = library.with_name(NOTE)
        # What an earlier build left in the same place would be installed as well.
        library.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            shutil.copy2(compile_extension(library.name), library)
        except BuildError as error:
            asked = os.environ.get("FUSED_ATTENTION_REQUIRE_EXT", "0") != "0"
            if asked or os.environ.get("FUSED_ATTENTION_CUDA") == "1":
                raise SystemExit(f"fused-attention: {error}") from None
            say(f"installed without its compiled kernels, the reference backend serves: {error}")
            note.write_text(f"{error}\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the same two files, beside the Python sources."""
        (ext,) = self.extensions
        built = Path(self.build_lib) / self.get_ext_filename(ext.name)
        package = ROOT / "python" / built.parent.name
        for source in (built, built.with_name(NOTE)):
            target = package / source.name
            # A new file, not new content: a running process may have the old library mapped.
            target.unlink(missing_ok=True)
            if source.exists():
                shutil.copy2(source, target)


setup(
    ext_modules=[Extension("fused_attention._C", sources=["csrc/bindings.cpp"], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
