"""Who runs a call, who does not and why."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import pytest
import torch

import fused_attention as fa
from fused_attention import cli, dispatch
from fused_attention.backends import cpu
from fused_attention.spec import Device

pytestmark = pytest.mark.fast


def _qkv(dtype: torch.dtype = torch.float32, d: int = 16, grad: bool = False) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 4, 20, d, dtype=dtype, requires_grad=grad) for _ in range(3))


def test_auto_takes_the_cpu_kernels() -> None:
    assert fa.explain(*_qkv()).backend == "cpu"


def test_named_backend_runs_or_raises() -> None:
    wide = _qkv(d=600)
    with fa.use_backend("cpu"), pytest.raises(fa.BackendError, match="head dims up to 512, not 600"):
        fa.attention(*wide)
    with fa.use_backend("cpu", strict=False), pytest.warns(fa.FallbackWarning):
        fa.attention(*wide)
    with fa.use_backend("reference"):
        assert fa.explain(*_qkv()).backend == "reference"


def test_unknown_backend() -> None:
    with pytest.raises(fa.ArgumentError, match="'flash'.*'reference'"), fa.use_backend("flash"):
        pass


def test_fallback_warns_with_the_reason_and_once() -> None:
    wide = _qkv(d=600)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            fa.attention(*wide)
    found = [w for w in seen if issubclass(w.category, fa.FallbackWarning)]
    assert len(found) == 1 and "head dims up to 512" in str(found[0].message)


def test_backend_request_is_per_context() -> None:
    with fa.use_backend("reference"), fa.use_backend("cpu"):
        assert fa.explain(*_qkv()).backend == "cpu"
    assert dispatch._request.get() == ("auto", True)


def test_the_ten_cases_of_explain(say: Callable[[str], None]) -> None:
    """Ten named cases as a readable table; what is refused has its reason."""
    q, k, v = _qkv()
    g, slopes = _qkv(grad=True), torch.rand(4, requires_grad=True)
    expected: dict[str, tuple[fa.Explanation, str | None, str]] = {
        "plain": (fa.explain(q, k, v), "cpu", ""),
        "causal bf16": (fa.explain(*_qkv(torch.bfloat16), causal="bottom_right"), "cpu", ""),
        "window, softcap, sinks": (
            fa.explain(q, k, v, window=(4, 0), softcap=30.0, sinks=torch.zeros(4)), "cpu", ""),
        "training with a bias": (
            fa.explain(*g, bias=torch.zeros(1, 4, 20, 20, requires_grad=True)), "cpu", "second derivative"),
        "weights": (fa.explain(q, k, v, return_weights="mean"), "cpu", "[2, 20, 20]"),
        "last dim strided": (fa.explain(q.mT.contiguous().mT, k, v), "cpu", "query is copied"),
        "head dim 512": (fa.explain(*_qkv(d=512)), "cpu", ""),
        "head dim 513": (fa.explain(*_qkv(d=513)), "reference", "head dims up to 512"),
        "gradient of ALiBi slopes": (fa.explain(*g, alibi_slopes=slopes), "reference", "no gradient for alibi"),
        "a tensor on the meta device": (fa.explain(*(t.to("meta") for t in (q, k, v))), "reference", "not on meta"),
    }  # fmt: skip
    for name, (explanation, backend, word) in expected.items():
        say(f"[{name}]\n{explanation}")
        assert explanation.backend == backend, name
        assert word in str(explanation), name
        assert json.loads(json.dumps(explanation.to_dict()))["backend"] == backend
    assert len(expected) == 10


def test_explain_names_transforms() -> None:
    q, k, v = _qkv()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        explanation = fa.explain(dual, k, v)
    assert explanation.backend == "reference"
    assert "forward-mode AD" in str(explanation.reasons["cpu"])


def test_a_precision_that_no_backend_has_is_an_error_with_every_reason() -> None:
    """The reference is no way out: it computes in the precision of the inputs."""
    q, k, v = _qkv(torch.bfloat16)
    own = "products in the precision of the inputs, not in fp8"
    for call in (
        lambda: fa.attention(q, k, v, precision="fp8"),
        lambda: fa.attention(q, k, v, mask=torch.ones(20, 20, dtype=torch.bool), precision="fp8"),
        lambda: torch.compile(fa.attention, backend="eager")(q, k, v, precision="fp8"),
    ):
        with pytest.raises(fa.BackendError) as caught:
            call()
        assert f"cpu: {own}; cuda: runs on CUDA tensors" in str(caught.value)
        assert "; triton: " in str(caught.value) and f"reference: {own}" in str(caught.value)
    for name in ("reference", "cpu"):
        with fa.use_backend(name), pytest.raises(fa.BackendError, match=f"{name}.*{own}"):
            fa.attention(q, k, v, precision="fp8")
    explanation = fa.explain(q, k, v, precision="fp8")
    assert explanation.backend is None and explanation.reasons["reference"] == own
    assert explanation.to_dict()["spec"]["precision"] == "fp8" and "precision=fp8" in str(explanation)


def test_explain_raises_as_attention_does() -> None:
    q, k, v = _qkv()
    with pytest.raises(fa.ArgumentError, match="window"):
        fa.explain(q, k, v, window=(-1, 0))


def test_missing_extension_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_import_error", "no compiler")
    explanation = fa.explain(*_qkv())
    assert explanation.backend == "reference" and "no compiler" in str(explanation.reasons["cpu"])
    with pytest.warns(fa.FallbackWarning, match="no compiler"):
        fa.attention(*_qkv())


def test_info_and_explain_from_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "cpu" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__
    command = ["explain", "--dtype", "bfloat16", "--window", "128", "none", "--gradients", "query", "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spec"]["window"] == [128, None] and found["backend"] == "cpu"
    assert cli.main(["explain", "--dtype", "bfloat16", "--precision", "fp8"]) == 1  # nobody runs it
    assert "products in the precision of the inputs, not in fp8" in capsys.readouterr().out
    assert cli.main(["explain", "--head-dim", "1024"]) == 0
    assert "head dims up to 512, not 1024" in capsys.readouterr().out


def test_device_description() -> None:
    assert Device.of(torch.zeros(1)) == Device("cpu")
