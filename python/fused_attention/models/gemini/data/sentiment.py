"""Sentences that praise or blame, composed of words whose valence people have rated.

The words and their ratings are those of VADER's lexicon (Hutto and Gilbert, 2014; MIT licence, package
vaderSentiment), read as a file. A sentence's label is the sign of its words' mean valence. Held out are one pair of
word and template in five, and three templates with all their words: each word of the test was seen, its sentence not.
"""

from __future__ import annotations

import functools
import re
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

LABELS = ("negative", "positive")
_WORDS_OF_A_SIGN = 150
_WEAKEST = 1.4  # of 4
_ENDINGS = re.compile("[a-z]+(?:ful|less|ous|able|ible|ive|ic|ing|ed|[^m]ent|ant)")
_CRUDE = re.compile("fuc?k|whor|rap(?:ed|ing)|bastard|murder|molest|goddam|tortur|sex|lynch")
_SHORT = "good great nice lovely happy superb perfect wise sweet brave proud calm fun cool best".split()
_SHORT += "bad sad ugly evil awful cruel angry poor sick rude nasty lousy bitter stupid worst".split()
_VERBS = "love like enjoy admire adore recommend appreciate trust praise".split()
_VERBS += "hate dislike despise fear regret loathe distrust condemn reject".split()
_THINGS = "phone film book song meal hotel story game picture city coat train lesson garden letter coin".split()

# None of their own words is in the lexicon. {w} is a rated word, {v} a rated verb, {x} a thing.
TEMPLATES = (
    "the {x} was {w}.",
    "what a {w} {x}!",
    "this {x} is so {w}.",
    "I found the {x} {w}.",
    "we thought that the {x} was {w}.",
    "everyone called it {w}.",
    "it was a {w} {x} from start to end.",
    "she said the {x} seemed {w} to her.",
    "in a word: {w}.",
    "they told us about a {w} {x}.",
    "how {w} this {x} is!",
    "my new {x} turned out to be {w}.",
    "I {v} this new {x}!",
    "we {v} that {x}.",
    "people here {v} the {x}.",
    "many of us {v} this {x} today.",
    "another {w} {x}, they wrote.",
    "after a week the {x} is still {w}.",
)
HELD_OUT_TEMPLATES = (
    "to me the {x} looked {w}.",
    "he came home with a {w} {x}.",
    "I {v} the {x} that you brought.",
)
_HELD_OUT_IN = 5


class Sentence(NamedTuple):
    text: str
    label: int  # of LABELS


@functools.cache
def lexicon() -> dict[str, float]:
    """word -> mean valence, -4 to 4. Raises `ModuleNotFoundError` where vaderSentiment is not installed."""
    spec = find_spec("vaderSentiment")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vaderSentiment is not installed: pip install 'fused-attention[gemini]'")
    lines = (Path(spec.origin).parent / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if "\t" in line)
    return {row[0]: float(row[1]) for row in rows}


@functools.cache
def words() -> dict[str, float]:
    """Adjectives and participles with their valence: the 150 strongest of either sign, by ending, and short ones."""
    rated = {w: v for w, v in lexicon().items() if abs(v) >= _WEAKEST and (_ENDINGS.fullmatch(w) or w in _SHORT)}
    rated = {word: valence for word, valence in rated.items() if not _CRUDE.match(word)}
    chosen = []
    for sign in (-1, 1):
        same = [word for word, valence in rated.items() if valence * sign > 0]
        chosen += sorted(same, key=lambda w: (w not in _SHORT, -abs(rated[w]), w))[:_WORDS_OF_A_SIGN]
    return {word: rated[word] for word in sorted(chosen)}


@functools.cache
def compose(split: str) -> tuple[Sentence, ...]:
    """Every sentence of `split`, "train" or "test": a word in a template, about a thing that the pair decides."""
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    rated = {"{w}": words(), "{v}": {w: v for w, v in lexicon().items() if w in _VERBS}}
    made = []
    for template in (*TEMPLATES, *HELD_OUT_TEMPLATES):
        slot = "{w}" if "{w}" in template else "{v}"
        for word, valence in rated[slot].items():
            pair = zlib.crc32(f"{word} {template}".encode())
            held_out = template in HELD_OUT_TEMPLATES or pair % _HELD_OUT_IN == 0
            if held_out == (split == "test"):
                thing = _THINGS[pair // _HELD_OUT_IN % len(_THINGS)]
                text = template.replace(slot, word).replace("{x}", thing)
                made.append(Sentence(re.sub(r"\ba (?=[aeiou])", "an ", text), int(valence > 0)))
    return tuple(made)
