"""Randomness that the guarantee rests on: bytes of the operating system, never stored, never seeded."""

import os
from typing import Protocol


class Entropy(Protocol):
    """Source of the noise and of the Poisson membership."""

    def random_bytes(self, count: int) -> bytes:
        """`count` independent uniform bytes."""
        ...


class OsEntropy:
    """The operating system's generator. There is no seed that could be written down or guessed."""

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)
