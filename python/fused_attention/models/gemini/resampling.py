"""From one sampling rate to another."""

from __future__ import annotations

import math

import numpy as np
from scipy.signal import resample_poly

# Images and aliases 90 dB down: below the floor of the mel frames, which scipy's own choice is not.
_WINDOW = ("kaiser", 9.0)


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """float64 [ceil(T wanted / rate)] of samples [T] at `rate` Hz, by a polyphase filter. Raises `ValueError` for a
    rate below 1 Hz.
    """
    if rate < 1 or wanted < 1:
        raise ValueError(f"sampling_rate: got {rate} Hz, expected a positive number")
    common = math.gcd(rate, wanted)
    return resample_poly(samples.astype(np.float64), wanted // common, rate // common, window=_WINDOW)
