"""Handwritten digits: the 1,797 pictures that scikit-learn carries.

They are 8 x 8 with 17 grey levels, bright on dark, from the UCI Machine Learning Repository (Alpaydin and Kaynak,
"Optical Recognition of Handwritten Digits", 1998). No picture of the test is ever augmented or trained on.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 8  # pixels of a side
LEVELS = 17  # grey levels, 0 / 16 to 16 / 16
_TEST_SHARE = 0.2
_SPLIT_SEED = 0


class Digits(NamedTuple):
    """images [N, 1, 8, 8] float32 in [0, 1]; labels [N] int64, 0 to 9."""

    images: Tensor
    labels: Tensor


@functools.lru_cache(maxsize=2)
def load(split: str) -> Digits:
    """The digits of `split`: "train" (1,437) or "test" (360), the same share of each digit in both, always the same."""
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows = np.arange(len(data.target))
    train, test = train_test_split(rows, test_size=_TEST_SHARE, random_state=_SPLIT_SEED, stratify=data.target)
    chosen = np.sort(train if split == "train" else test)
    images = torch.from_numpy(data.images[chosen]).float()[:, None] / (LEVELS - 1)
    return Digits(images, torch.from_numpy(data.target[chosen]).long())


def augment(image: Tensor, rng: np.random.Generator) -> Tensor:
    """The picture [1, 8, 8] moved by at most a pixel each way, dark coming in, and its brightness scaled by 0.8 to 1.

    Grey levels stay multiples of 1 / 16, as in the originals.
    """
    down, right = (int(step) for step in rng.integers(-1, 2, size=2))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    moved = padded[:, 1 - down : 1 - down + SIZE, 1 - right : 1 - right + SIZE]
    return (moved * float(rng.uniform(0.8, 1.0)) * (LEVELS - 1)).round() / (LEVELS - 1)
