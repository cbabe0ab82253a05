"""The tolerance rule, the problems it is applied to, and the command with which users apply it on their own machine."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
