"""More requests than rows, proposals, and what rows share: Engine."""
from __future__ import annotations

from batching.engine import Engine
from batching.prefix import reads_better
from batching.saved import load_row, read_row, save_row
from batching.stats import Stats

__all__ = ["Engine", "Stats", "load_row", "read_row", "reads_better", "save_row"]
