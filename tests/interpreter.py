"""Triton's interpreter, which runs the kernels on the CPU."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def interpreted_kernels():
    """Triton's interpreter in place of its compiler.

    Usually TRITON_INTERPRET=1 is set before Triton is imported, so that ``triton.jit`` returns functions of the
    interpreter for ever. Here those take the place of the functions for the compiler, in Triton's language and in the
    modules of the kernels, and go again.
    """
    functions = {}

    def for_interpreter(function):
        return functions.setdefault(function.fn, triton.jit(function.fn))

    def is_kernels(name):
        return name.startswith(('mmubn.ops.triton.', 'triton.language.')) or name == 'triton.language'

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_INTERPRET', '1')
        patch.setattr(interpreter.InterpretedFunction, 'rewritten_fn', {})
        _patch_once_per_launch(patch)
        modules = [module for name, module in sys.modules.items() if is_kernels(name)]
        for owner in (*modules, tl.tensor):
            for name, value in list(vars(owner).items()):
                if isinstance(value, triton.JITFunction):
                    patch.setattr(owner, name, for_interpreter(value))
        names = {module: set(vars(module)) for module in modules}
        yield
        for module, before in names.items():  # what the interpreter added for itself, but no module that was imported
            for name in vars(module).keys() - before:
                if f'{module.__name__}.{name}' not in sys.modules:
                    delattr(module, name)


def _patch_once_per_launch(patch):
    """At every call of one function by another the interpreter looks for what to patch in Triton's language, a third of
    its time; here a launch patches all of it once."""
    patch_language, language = interpreter._patch_lang, SimpleNamespace(__globals__={'tl': tl, 'core': tl.core})
    patch.setattr(interpreter, '_patch_lang', lambda kernel: patch_language(language))
    patch.setattr(
        interpreter.InterpretedFunction,
        '__call__',
        lambda function, *arguments, **constants: function.rewrite()(*arguments, **constants),
    )
