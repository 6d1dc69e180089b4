"""Tests of the parts, one file each; `python tests.py` runs them all."""
