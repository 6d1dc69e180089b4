"""What makes a CPU faster: its products, and libraries that are kept of a step (ahead).

Importing it adds the products to quantize.LAYOUTS."""
import logging

from cpu import products

# When logging was loaded, which is before PyTorch is there, and so the core: files that are edited
# from then on may not be what runs here.
NOW = logging.makeLogRecord({})
BEGAN = NOW.created - NOW.relativeCreated / 1000
__all__ = ["products"]
