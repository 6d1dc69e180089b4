"""What makes a CPU faster: its products, and libraries that are kept of a step (ahead).

Importing it adds the products to quantize.LAYOUTS."""
from cpu import products

__all__ = ["products"]
