"""What torch.compile (Inductor) copies to hand x and its gradients over to the Triton operators.

Inductor turns a network with convolutions channels-last, whatever the layout of its input; on a CPU too. Nothing is
launched here, and what Inductor itself would compile does nothing: its program is read.
"""

import re
import sys

import pytest
import torch
from torch import nn

pytest.importorskip('triton')

from torch._inductor import async_compile, config
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from mmubn import UBN
from mmubn.ops import use_backend
from mmubn.ops.triton import operators, runtime

C, NORMS = 16, 3


class Network(nn.Module):
    """Three convolutions and norms, and what a subclass makes of them."""

    def __init__(self):
        super().__init__()
        channels = (3, C, C)
        self.convs = nn.ModuleList(nn.Conv2d(c, C, 3, padding=1, bias=False) for c in channels)
        self.norms = nn.ModuleList(UBN(C) for _ in channels)
        self.head = nn.Conv2d(C, 2, 1)


class Residual(Network):
    """conv - norm - relu, then a block of two with a shortcut."""

    def features(self, x):
        x = torch.relu(self.norms[0](self.convs[0](x)))
        y = torch.relu(self.norms[1](self.convs[1](x)))
        return torch.relu(x + self.norms[2](self.convs[2](y)))

    def forward(self, x):
        return self.head(self.features(x))


class PreActivation(Network):
    """Norms of sums, which Inductor computes itself, in a layout that it chooses."""

    def forward(self, x):
        x = self.convs[0](x)
        y = self.convs[1](torch.relu(self.norms[0](x)))
        x = x + self.convs[2](torch.relu(self.norms[1](y)))
        return self.head(torch.relu(self.norms[2](x)))


class Pooled(Residual):
    """The gradient of the last norm comes from a mean: Inductor computes it in NCHW."""

    def forward(self, x):
        return self.features(x).mean((2, 3))


@pytest.fixture
def copied_inside(monkeypatch):
    """The operators that copied a gradient to the layout of x, once for each time."""
    found = []
    for name in ('tap_sums', 'input_gradient'):
        module = sys.modules[f'mmubn.ops.triton.{name}']
        dense_gradient = module.dense_gradient

        def watched(dy, x, name=name, dense_gradient=dense_gradient):
            result = dense_gradient(dy, x)
            if result.data_ptr() != dy.data_ptr():
                found.append(name)
            return result

        monkeypatch.setattr(module, 'dense_gradient', watched)
    return found


@pytest.fixture(autouse=True)
def inductor(monkeypatch):
    """Inductor without a C++ compiler: what it would compile does nothing."""
    torch._dynamo.reset()
    monkeypatch.setattr(async_compile.AsyncCompile, 'cpp_pybinding', lambda *_, **__: lambda *_: None)
    with config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def run(network, format, mode, dynamic=None, sizes=((8, 8),)):
    """Inductor's programs for a step, and the launches of the last."""
    network = network().to(memory_format=format).train(mode == 'training')
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic)

    def step(x):
        with torch.set_grad_enabled(mode == 'training'):
            y = compiled(x)
        if mode == 'training':
            y.backward(torch.ones_like(y))

    programs = []
    for h, w in sizes:
        x = torch.randn(2, 3, h, w).contiguous(memory_format=format)
        with use_backend('triton'), runtime.recorded() as launches:
            _, found = run_and_get_code(step, x)
        programs += found
    return '\n'.join(programs), launches


def copies_for_operators(program):
    """Inductor's kernels that are for an operator: it names them by what they are for, and never fuses an operator."""
    names = '|'.join(operators.__all__)
    return sorted(set(re.findall(rf'\bcpp_fused_(?:\w+_)?(?:{names})_\w*', program)))


def test_copies_are_found_by_the_names_of_kernels():
    """As Inductor called them for operators that took the strides of the trace alone."""
    program = 'cpp_fused_apply_instance_moments_similarity_sums_view_1(a, b); cpp_fused_relu_3(); mmubn.apply.default('
    assert copies_for_operators(program) == ['cpp_fused_apply_instance_moments_similarity_sums_view_1']


def layouts_of_maps(launches):
    maps = [a for launch in launches for a in launch.arguments if torch.is_tensor(a) and a.shape[1:2] == (C,)]
    return {a.is_contiguous(memory_format=torch.channels_last) for a in maps if a.dim() == 4}


FORMATS = [torch.contiguous_format, torch.channels_last]


CASES = [
    (network, mode, format)
    for network in (Residual, PreActivation)
    for mode in ('training', 'evaluation')
    for format in FORMATS
]


@pytest.mark.slow  # an Inductor run takes many seconds
@pytest.mark.parametrize(('network', 'mode', 'format'), CASES)
def test_nothing_is_copied_for_an_operator(network, mode, format, copied_inside):
    program, launches = run(network, format, mode)
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names.count('_apply_kernel') == program.count('torch.ops.mmubn.apply.default(') == NORMS
    assert names.count('_input_gradient_kernel') == (NORMS if mode == 'training' else 0)
    assert copies_for_operators(program) == []
    assert copied_inside == []
    # Not as traced, but as Inductor has it.
    assert layouts_of_maps(launches) == {True}


@pytest.mark.slow
def test_a_gradient_in_another_layout_is_copied_by_the_operators_that_read_it(copied_inside):
    """docs/performance.md says so."""
    program, launches = run(Pooled, torch.contiguous_format, 'training')
    assert copies_for_operators(program) == []
    assert copied_inside in ([], ['tap_sums', 'input_gradient'])
    assert layouts_of_maps(launches) == {True}


@pytest.mark.slow
def test_another_size_of_a_dynamic_graph(copied_inside):
    program, launches = run(Residual, torch.contiguous_format, 'training', dynamic=True, sizes=((8, 8), (10, 12)))
    assert copies_for_operators(program) == []
    assert copied_inside == []
    assert layouts_of_maps(launches) == {True}
    assert launches[-1].arguments[0].shape == (2, C, 10, 12)


# What Inductor allocates and reads follows the fake functions, for whatever strides it hands over.

MAPS = {
    'nchw': torch.zeros(2, 3, 4, 5),
    'channels_last': torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    'part of more channels': torch.zeros(2, 6, 4, 5)[:, :3],
    'part of more channels, channels_last': torch.zeros(2, 4, 5, 6).permute(0, 3, 1, 2)[:, :3],
    'transposed': torch.zeros(2, 3, 5, 4).transpose(2, 3),
    'expanded': torch.zeros(2, 3, 1, 1).expand(2, 3, 4, 5),
    'one pixel': torch.zeros(2, 3, 1, 1),
    'one channel': torch.zeros(2, 1, 4, 5).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize('of_gradient', MAPS)
@pytest.mark.parametrize('of_x', MAPS)
def test_fake_outputs_have_the_strides_of_the_real_ones(of_x, of_gradient):
    x, dy = MAPS[of_x], MAPS[of_gradient]
    if x.shape != dy.shape:
        dy = x
    of_sample, of_channel = torch.zeros(x.shape[:2]), torch.zeros(x.shape[1])
    taps = of_channel, torch.zeros(x.shape[1], 8)
    calls = {
        'instance_moments': (x,),
        'similarity_sums': (x, of_sample, of_sample, 16),
        'apply': (x, of_sample, of_sample, *taps, of_channel),
        'tap_sums': (x, dy, of_sample, 3),
        'input_gradient': (dy, x, of_sample, of_sample, *taps, of_sample, of_sample),
    }
    with runtime.recorded():
        real = {name: getattr(torch.ops.mmubn, name)(*arguments) for name, arguments in calls.items()}
    with FakeTensorMode() as mode:
        for name, arguments in calls.items():
            fake = (mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments)
            found, expected = getattr(torch.ops.mmubn, name)(*fake), real[name]
            pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
            for one, other in pairs:
                assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype), name
                assert one.storage_offset() == other.storage_offset(), name
