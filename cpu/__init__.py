"""What makes a CPU faster: its products, and libraries that are kept of a step (ahead).

Importing it adds the products to quantize.LAYOUTS."""
import time

from cpu import products

IMPORTED = time.time()  # what is edited from now on runs later, or in a notebook that reloads it
__all__ = ["products"]
