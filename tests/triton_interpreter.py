"""Triton's interpreter: bfloat16 as on a GPU, and what takes long in it shortened.

The interpreter keeps bfloat16 as its bits in uint16. It rounds float32 to it toward zero, where
hardware rounds to nearest, and ``tl.dot`` multiplies the bits as if they were integers. With these
two mended, kernels may load, store, convert and multiply matrices of bfloat16 in it; any other
arithmetic on bfloat16 is still wrong there.

It spends half of its time on three things besides the kernels, which are the same here in less of it: it
looks through the whole language at every call of a device function, it checks every sum, difference and
product of integers for an overflow by a dozen of its own operations, and it makes its table of NumPy's
dtypes again for every result.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


def mend() -> None:
    """Patches the interpreter, if Triton is installed. To be called once, with TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        return
    _mend_bfloat16()
    _prepare_the_language_once()
    _check_overflow_by_numpy()
    _remember_dtypes()


def _mend_bfloat16() -> None:
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


def _prepare_the_language_once() -> None:
    """A launch replaces the language by the interpreter's; the device functions in it find it replaced."""
    import triton.language as tl
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang

    @functools.cache
    def modules_of(function: Any) -> list[Any]:
        return [x for x in function.__globals__.values() if x is tl or x is tl.core]

    def prepare_once(function: Any) -> Any:
        missing = any(tl.core.is_builtin(module.load) for module in modules_of(function))
        return prepare(function) if missing else interpreter._LangPatchScope()

    interpreter._patch_lang = prepare_once


def _check_overflow_by_numpy() -> None:
    import numpy as np
    from triton.language.semantic import TritonSemantic

    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, a: Any, b: Any, operation: Any) -> None:
        integer = a.type.scalar
        if integer.int_bitwidth >= 64:
            return
        result = exact[operation.__name__](*(x.handle.data.astype(np.int64) for x in (a, b)))
        fits = integer.get_int_min_value() <= result.min() and result.max() <= integer.get_int_max_value()
        assert fits, f"{integer} overflows in {operation.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _remember_dtypes() -> None:
    from triton.runtime import interpreter

    find = interpreter._get_np_dtype
    of_numbers = functools.cache(find)

    def dtype(type: Any) -> Any:
        return find(type) if type.scalar.is_ptr() else of_numbers(type.scalar)  # pointers have no hash

    interpreter._get_np_dtype = dtype
