"""Transports."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Transport(ABC):
    """Moves bytes between the memory of two cache processes."""

    @abstractmethod
    def close(self) -> None:
        """End every transfer and give everything back. Safe to call twice."""
