"""Loops compiled by numba when first imported, and from then on loaded from its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba import types
from numba.extending import register_jitable

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def read(dtype: Any, ndim: int) -> Any:
    """C-contiguous input that may be read-only and, as a payload in a received frame may be, unaligned."""
    return types.Array(dtype, ndim, "C", readonly=True, aligned=False)


def write(dtype: Any, ndim: int) -> Any:
    return types.Array(dtype, ndim, "C")


def native(*signature: Any) -> Callable[[Kernel], Kernel]:
    """Compile now, for exactly these arguments; the answer is a whole number."""
    return cast("Callable[[Kernel], Kernel]", numba.njit(types.int64(*signature), nogil=True, cache=True))


def inlined(helper: Kernel) -> Kernel:
    """Compiled with the kernels that call it."""
    return register_jitable(helper)
