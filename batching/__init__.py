"""More requests than rows, and proposals: Engine."""
from __future__ import annotations

from batching.engine import Engine, Stats

__all__ = ["Engine", "Stats"]
