"""Ours beside its peers: the shapes, the check before each timing, the timing, and what is written of it."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
