"""Sentences: the docstrings of Python's own standard library, read from its source files and never imported.

Which module is whose follows from a hash of its name, so no module is in both splits. The texts are those of the
running Python: another version has other ones.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import platform
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from . import cache

SPLITS = ("train", "valid")
# Tests, other people's packages, programs, and what holds generated tables.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"}
_LEFT_OUT |= {"__pycache__", "encodings", "pydoc_data", "_pydecimal"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()\-/`*=._]*[.!?]")
_VERSION = 1  # of the rules below, in the cache's name
_VALID_IN = 10  # one module of so many is for validation
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 20, 200


@functools.lru_cache(maxsize=2)
def sentences(split: str) -> tuple[str, ...]:
    """The sentences of `split`, "train" or "valid", each once, in the order of modules and lines.

    The first call reads the library, which takes seconds; later ones a file in the user's cache.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
    path = cache.folder() / f"sentences-{_VERSION}-{sys.implementation.cache_tag}-{platform.python_version()}.json"
    if not path.exists():
        text = json.dumps(_read_library())
        cache.write(path, lambda file: file.write(text.encode()))
    return tuple(json.loads(path.read_text())[split])


def _read_library() -> dict[str, list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, dict[str, None]] = {split: {} for split in SPLITS}
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if not _LEFT_OUT & {*module.parts, module.stem}:
            found[_split_of(module)].update(dict.fromkeys(_sentences_of(path)))
    # A docstring may stand in two modules: it is trained on, then.
    return {"train": list(found["train"]), "valid": [s for s in found["valid"] if s not in found["train"]]}


def _split_of(module: Path) -> str:
    # A package goes as a whole: its modules speak of one thing.
    return SPLITS[zlib.crc32(Path(module.parts[0]).stem.encode()) % _VALID_IN == 0]


def _sentences_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in somebody's strings
            tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError):  # templates and samples of bad code lie in the library too
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _clean(ast.get_docstring(node, clean=False) or "")


def _clean(docstring: str) -> Iterator[str]:
    """The sentences of its paragraphs of prose: no examples, lists, signatures or tables."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = paragraph.splitlines()
        if ">>>" in paragraph or any(line[:1] in (" ", "\t", "*", "-", "+", "|") for line in lines):
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if _FEWEST_CHARACTERS <= len(sentence) <= _MOST_CHARACTERS and _PROSE.fullmatch(sentence):
                yield sentence
