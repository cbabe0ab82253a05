"""What the README shows is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fused_attention import cli

pytestmark = pytest.mark.fast

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_feature_table_is_the_backends_answer() -> None:
    found = re.search(r"<!-- features -->\n(.*?)\n<!-- /features -->", README, re.S)
    assert found, "the README has no feature table"
    assert found.group(1) == cli.feature_table(), "write it anew with python -m fused_attention info --features"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "cpu        runs" in printed and "self_attn" in printed


def test_every_public_name_is_in_the_readme() -> None:
    import fused_attention

    helpers = {"ArgumentError", "AttentionResult", "AttentionSpec", "BackendError", "Explanation", "FallbackWarning"}
    for name in set(fused_attention.__all__) - helpers:
        assert f"`{name}" in README, name
