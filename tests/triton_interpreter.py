"""bfloat16 in Triton's interpreter as on a GPU.

The interpreter keeps bfloat16 as its bits in uint16. It rounds float32 to it toward zero, where
hardware rounds to nearest, and ``tl.dot`` multiplies the bits as if they were integers. With these
two mended, kernels may load, store, convert and multiply matrices of bfloat16 in it; any other
arithmetic on bfloat16 is still wrong there.
"""

from __future__ import annotations

import importlib.util
from typing import Any


def mend_bfloat16() -> None:
    """Patches the interpreter, if Triton is installed. To be called once, with TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        return
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
        source = widened(source)
        return source if source.dtype.scalar == target.scalar else cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
