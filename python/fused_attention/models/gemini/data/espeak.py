"""espeak-ng through ctypes: a text and a voice into samples.

The library and its voices come with the package espeakng-loader, an optional dependency. espeak-ng is licensed under
the GNU General Public License, version 3 or later; neither it nor a clip that it made is part of this package: clips
are synthesised on the user's machine.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Of espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_UTF8 = 1
_RATE, _PITCH = 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Voice(NamedTuple):
    """accent: a language of espeak-ng, as "en-us"; variant: a file of its voices/!v, as "f2"; rate: words a minute;
    pitch: 0 to 99.
    """

    accent: str
    variant: str
    rate: int = 175
    pitch: int = 50


class Synthesiser:
    """A library of its own, fresh from its file: what it says follows from what it was asked, in that order.

    espeak-ng keeps its state in globals, the phase of a voice's flutter and the noise of its breath among them, and
    nothing resets them; two of these do not disturb each other. Not for several threads at once.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "espeakng-loader is not installed: pip install 'fused-attention[gemini]'"
            ) from error
        self._variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
        self._library = _load_copy(Path(espeakng_loader.get_library_path()))
        self._library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
            *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
        ]
        data = espeakng_loader.get_data_path().encode()
        self.sampling_rate = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT))
        if self.sampling_rate <= 0:
            raise RuntimeError(f"espeak-ng did not start: code {self.sampling_rate}, voices at {data.decode()}")
        self._pieces: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library calls it later
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: int) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: Voice) -> np.ndarray:
        """int16 samples at `sampling_rate` Hz, the same for the same arguments. Raises `ValueError` for a voice that
        espeak-ng has not got, which by itself would go on with another.
        """
        if not (self._variants / voice.variant).is_file():
            raise ValueError(f"voice: espeak-ng has no variant {voice.variant!r}")
        if self._library.espeak_SetVoiceByName(f"{voice.accent}+{voice.variant}".encode()) != 0:
            raise ValueError(f"voice: espeak-ng has no language {voice.accent!r}")
        self._library.espeak_SetParameter(_RATE, voice.rate, 0)
        self._library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        self._pieces.clear()
        encoded = text.encode()
        code = self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
        if code != 0 or not self._pieces:
            raise RuntimeError(f"espeak-ng did not say {text!r}: code {code}")
        return np.concatenate(self._pieces)


def _load_copy(path: Path) -> ctypes.CDLL:
    """The library under a name that no other has: the loader would give the one that is loaded already."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # an open file stays where it must
        return ctypes.CDLL(shutil.copy(path, folder))
