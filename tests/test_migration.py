"""The guides for those who come from another function: every block of Python in them runs, and its asserts hold."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from . import flash_attn_meaning

GUIDES = sorted((Path(__file__).parent.parent / "docs" / "migration").glob("*.md"))


@pytest.mark.fast
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_every_block_runs(guide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available() or find_spec("flash_attn") is None:
        monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_meaning)
    text = guide.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.S))
    assert len(blocks) >= 2 and sum("assert" in b[1] for b in blocks) >= 1
    names: dict[str, object] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(guide), "exec"), names)


@pytest.mark.fast
def test_there_is_a_guide_for_each() -> None:
    wanted = {"multihead_attention", "scaled_dot_product_attention", "flash_attn", "flex_attention"}
    assert {path.stem for path in GUIDES} == wanted
