"""Triton's interpreter, mended for bfloat16. A copied test needs a copy of this file beside it."""
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

PLAIN_CAST = InterpreterBuilder.cast_impl


def cast_through_float32(
    self: InterpreterBuilder, x: TensorHandle, dtype: tl.dtype
) -> TensorHandle:
    """The interpreter keeps bfloat16 as its bits; its cast forgets so if no side is float32."""
    kinds = (x.dtype.scalar, dtype.scalar)
    if tl.bfloat16 in kinds and tl.float32 not in kinds:
        x = PLAIN_CAST(self, x, tl.float32)
    return PLAIN_CAST(self, x, dtype)


def dot_through_float32(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *_: Any
) -> TensorHandle:
    """The interpreter's dot forgets the same."""
    if a.dtype.scalar == tl.bfloat16:
        a = PLAIN_CAST(self, a, tl.float32)
    if b.dtype.scalar == tl.bfloat16:
        b = PLAIN_CAST(self, b, tl.float32)
    product = np.matmul(a.data, b.data, dtype=acc.data.dtype)
    return TensorHandle(product + acc.data, acc.dtype.scalar)


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test. TRITON_INTERPRET has to be set before this file is imported."""
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_through_float32)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_through_float32)
