"""mmubn.analysis.kernel_cache: what it compiles is what a run looks for."""

import collections

import pytest
import torch

pytest.importorskip('triton')

from triton.compiler import ASTSource

from mmubn import UBN
from mmubn.analysis.host_time import StandInDriver, stand_in
from mmubn.analysis.kernel_cache import cache_folder, compile_variants, variants_of
from mmubn.analysis.machine_code import launches_of_a_step
from mmubn.ops import use_backend
from mmubn.ops.triton import operators

SHAPE = (3, 16, 2, 3)


def test_a_run_compiles_nothing_more(monkeypatch, tmp_path):
    """A training step of a layer, by Triton's own launch, short of the GPU."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    launches = launches_of_a_step(SHAPE, torch.float32, torch.contiguous_format, 1)
    variants = dict.fromkeys(variants_of(launches))
    done = list(compile_variants(variants, [90], jobs=2))
    assert len(done) == len(variants) >= 7
    assert set(done) == set(variants)
    assert cache_folder() == tmp_path

    compiled, launched = [], []
    make_ir = ASTSource.make_ir

    def count(source, *arguments, **options):
        compiled.append(source.name)
        return make_ir(source, *arguments, **options)

    monkeypatch.setattr(ASTSource, 'make_ir', count)
    for kernel in {launch.kernel for launch in launches}:
        # What this process compiled before is forgotten: there is the folder alone.
        monkeypatch.setattr(kernel, 'device_caches', collections.defaultdict(kernel.create_binder))
    layer, x = UBN(SHAPE[1], kernel_size=1), torch.randn(SHAPE, requires_grad=True)
    with stand_in(StandInDriver(lambda *launch: launched.append(launch))), use_backend('triton'):
        layer(x).backward(torch.ones_like(x))
        assert len(launched) == len(launches)
        assert compiled == []
        # Another dtype is another variant, and this would see it.
        operators.instance_moments(x.detach().bfloat16())
        assert compiled == ['_moments_kernel']


def test_variants_are_what_triton_compiles_once():
    """Sizes that no kernel is compiled for have no variants of their own; whether 16 divides one is another."""

    def variants(n, c, h, w):
        launches = launches_of_a_step((n, c, h, w), torch.float32, torch.channels_last, 3)
        return set(variants_of(launches))

    assert variants(2, 64, 56, 56) == variants(2, 64, 112, 112)
    assert variants(2, 64, 56, 56) != variants(2, 63, 56, 56)
