"""What makes a CPU faster: its products, a cache that compiles well, libraries kept of a step.

Importing it adds to the tables of quantize.py and model.py."""
from __future__ import annotations

from pathlib import Path

from cpu import products
from cpu.cache import CPULayerCache
from model import FORMATS, LIBRARIES, BlockForward

__all__ = ["products"]


def ahead_of_time(
    otherwise: BlockForward, build: bool = False, folder: Path | None = None
) -> BlockForward:
    """What runs blocks from kept libraries: see cpu/ahead.py, which is imported late."""
    from cpu.ahead import AheadOfTime
    return AheadOfTime(otherwise, build, folder)


FORMATS["cpu"] = CPULayerCache
LIBRARIES["cpu"] = ahead_of_time
