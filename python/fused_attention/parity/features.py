"""Which problems stand for which feature; every one is run forward and backward."""

from __future__ import annotations

from .problems import Case

_SQUARE = (2, 4, 4, 65, 65, 32, 32)

FEATURES: dict[str, tuple[Case, ...]] = {
    "plain": (Case("plain"), Case("more rows", (1, 2, 2, 129, 100, 64, 64))),
    "odd sizes": (
        Case("one row", (1, 4, 4, 1, 203, 40, 40)),
        Case("one key", (1, 4, 4, 113, 1, 24, 24)),
        Case("odd dims", (1, 3, 3, 33, 67, 19, 7)),
    ),
    "causal, top-left": (Case("square", _SQUARE, causal="top_left"), Case("wide", causal="top_left")),
    "causal, bottom-right": (
        Case("wide", causal="bottom_right"),
        Case("tall", (1, 4, 4, 70, 33, 16, 16), "bottom_right"),
    ),
    "window": (Case("causal", _SQUARE, "top_left", (9, 0)), Case("both sides", _SQUARE, None, (5, 12))),
    "bool mask": (Case("keys", mask="bool:b11n", dead=True), Case("full", mask="bool:bhmn", dead=True)),
    "float mask, with gradient": (Case("full", mask="float:bhmn"), Case("hiding", mask="hiding:11mn", dead=True)),
    "bias, with gradient": (Case("heads", bias="float:1hmn"), Case("keys", bias="half:b11n", causal="bottom_right")),
    "key lengths": (Case("lengths", key_lengths=True, dead=True), Case("NaN", key_lengths=True, nan_hidden=True)),
    "block maps": (
        Case("heads", (2, 4, 2, 70, 90, 16, 16), block_map="bh:0.5:32x16", dead=True),
        Case("causal", (1, 4, 4, 100, 140, 16, 16), "bottom_right", block_map="1h:0.6:16x64"),
        Case("NaN", (2, 2, 2, 65, 100, 32, 32), block_map="b1:0.5:48x32", nan_hidden=True),
    ),
    "packed sequences": (
        Case("packed", (4, 4, 2, 17, 40, 16, 24), "bottom_right", packed=((5, 0, 17, 9), (5, 3, 0, 40))),
    ),
    "grouped heads": (Case("four", (2, 8, 2, 40, 40, 16, 16)), Case("all", (2, 6, 1, 17, 65, 32, 16), "bottom_right")),
    "value dim other than head dim": (
        Case("larger", (1, 4, 4, 40, 50, 24, 72)),
        Case("less", (1, 4, 4, 40, 50, 64, 8)),
    ),
    "head dim 128": (Case("128", (1, 2, 2, 65, 65, 128, 128), "top_left"),),
    "head dim 256": (Case("256", (1, 2, 2, 33, 65, 256, 256)),),
    "head dim 512": (Case("512", (1, 2, 2, 19, 37, 512, 512)),),
    "softcap": (Case("softcap", softcap=3.0), Case("causal", softcap=0.7, causal="top_left", scale=2.0)),
    "ALiBi": (Case("heads", alibi="h", causal="bottom_right"), Case("batches", alibi="bh")),
    "sinks, with gradient": (Case("sinks", sinks=True), Case("window", _SQUARE, "top_left", (9, 0), 5.0, sinks=True)),
    "dropout": (Case("dropout", dropout_p=0.3), Case("grouped", (2, 4, 2, 67, 67, 16, 16), "top_left", dropout_p=0.5)),
    "attention weights": (Case("heads", weights="heads"), Case("mean", weights="mean", causal="bottom_right")),
    "batch-invariant rows": (Case("batch-invariant", batch_invariant=True, causal="top_left"),),
    "strided layouts": tuple(
        Case(n, (2, 3, 3, 41, 41, 24, 24), layout=n) for n in ("bmhd", "qkv", "expanded", "reversed")
    ),
    "very negative scores": (Case("negative", (1, 2, 2, 40, 60, 64, 64), shift=3.0),),
    "everything at once": (
        Case(
            "everything",
            (2, 4, 2, 61, 77, 40, 24),
            "bottom_right",
            (30, 5),
            4.0,
            mask="bool:b1mn",
            bias="half:1hmn",
            alibi="bh",
            sinks=True,
            key_lengths=True,
            dropout_p=0.1,
            weights="mean",
            dead=True,
        ),
    ),
}
