"""Backends ``cpp`` and ``cuda``: the compiled module ``fastvae._C``, called with the addresses of torch's own memory.

The module knows nothing of PyTorch: it takes integers. ``primitives.py`` turns tensors into them, the same for both;
``cpp.py`` and ``cuda.py`` say on which device, and add what each needs: a number of threads, or a stream.
"""

try:
    from fastvae import _C as native  # noqa: N811
except ImportError as error:
    raise ImportError(f"{error}; an install builds it where it finds a C++ compiler") from error

__all__ = ["native"]
