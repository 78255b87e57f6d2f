"""The backend ``cpp``: C++ kernels for the CPU, compiled at their first use."""

from mmubn.ops.cpp.backend import CppBackend

__all__ = ['CppBackend']
