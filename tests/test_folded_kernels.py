"""How a folded layer is computed: by the backends in eager mode, in an export with few passes over the maps."""

import copy
import functools

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import nn
from torch.nn.utils import parametrizations

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN, image_areas, ops
from mmubn.analysis.benchmark import count_map_nodes
from mmubn.deploy import FoldedUBN, fold
from mmubn.ops.cpp import CppBackend

LAYERS = {
    'UBN': UBN,
    'UBN 1x1': functools.partial(UBN, kernel_size=1),
    'UBN 5x5': functools.partial(UBN, kernel_size=5),
    'UBN, bias calibrated': functools.partial(UBN, calibrate_bias=True),
    'UBN 1x1, bias calibrated': functools.partial(UBN, kernel_size=1, calibrate_bias=True),
    'UBN without scaling': functools.partial(UBN, scaling=False),
    'UBN without centering': functools.partial(UBN, centering=False),
    'SyncUBN': SyncUBN,
    'RBN': RBN,
    'BNET': BNET,
    'IEBN': IEBN,
}
DYNAMIC = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
EACH_LAYER = pytest.mark.parametrize('make', LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def evaluations(monkeypatch):
    """The shapes of the maps that the C++ kernels evaluated."""
    seen = []
    evaluate = CppBackend.evaluate

    def record(self, x, constants):
        seen.append(tuple(x.shape))
        return evaluate(self, x, constants)

    monkeypatch.setattr(CppBackend, 'evaluate', record)
    return seen


def trained(model):
    """The model in evaluation mode, its norms random."""
    for seed, layer in enumerate(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        randomize(layer, seed=seed)
    return model.eval()


@EACH_LAYER
class TestNumbers:
    """Beside whole vectors, beyond the kernels' pieces (3072 and 4096 values, 128 channels), and smaller than taps."""

    SHAPES = ((2, 5, 1, 1), (1, 130, 3, 2), (1, 3, 1, 40), (2, 2, 70, 65), (17, 3, 4, 3))

    @pytest.mark.parametrize('backend', ['cpp', 'torch'])
    def test_a_backend_is_the_layer(self, make, backend):
        for n, c, h, w in self.SHAPES:
            layer = trained(make(c)).double()
            folded = fold(layer)
            for layout in (torch.contiguous_format, torch.channels_last):
                x = (torch.randn(n, c, h, w, dtype=torch.float64) + 1).contiguous(memory_format=layout)
                with ops.use_backend('reference'):
                    expected = layer(x).detach()
                with ops.use_backend(backend):
                    y = folded(x)
                torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
                assert y.is_contiguous(memory_format=layout)

    def test_threads_do_not_matter(self, make):
        folded, x = fold(trained(make(24))), torch.randn(2, 24, 30, 31)
        threads = torch.get_num_threads()
        try:
            outputs = []
            for number in (1, 2):
                torch.set_num_threads(number)
                outputs.append(folded(x))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*outputs)

    def test_values_that_are_not_finite_stay_in_their_map(self, make):
        folded = fold(trained(make(3)))
        x = torch.randn(2, 3, 5, 6)
        expected = folded(x)
        for value in (float('nan'), float('inf')):
            x[1, 2, 3, 4] = value
            y = folded(x)
            assert not y[1, 2].isfinite().all()
            assert torch.equal(y.flatten(0, 1)[:5], expected.flatten(0, 1)[:5])

    def test_gradient_of_the_input(self, make, evaluations):
        """As an attribution method asks for it, to second order."""
        layer = trained(make(3)).double()
        folded, (x, other) = fold(layer), torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
        gradients = []
        for model in (folded, layer):
            value = x.clone().requires_grad_()
            (first,) = torch.autograd.grad((model(value).sin() * other).sum(), value, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), value)
            gradients.append((first.detach(), second))
        torch.testing.assert_close(*gradients)
        assert len(evaluations) == 1
        with torch.no_grad():
            folded(x.requires_grad_())
        assert not folded(x.detach()).requires_grad


def test_one_call_of_a_kernel_for_each_layer_of_a_network(evaluations):
    """Also where the convolutions before have gradients: nobody is slower for having forgotten no_grad."""
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), UBN(4), nn.ReLU(), nn.Conv2d(4, 8, 3), BNET(8), RBN(8)))
    x = torch.randn(2, 3, 9, 8)
    folded = fold(model)
    torch.testing.assert_close(folded(x), model(x))
    assert evaluations == [(2, 4, 7, 6), (2, 8, 5, 4), (2, 8, 5, 4)]
    folded(x).sum().backward()
    expected = torch.autograd.grad(model(x).sum(), model[0].weight)
    torch.testing.assert_close(folded[0].weight.grad, *expected)


@torch.no_grad()
def test_images_of_a_padded_batch_are_refused():
    """Its means are over the whole map: within image areas it would be another function than the layer."""
    layer, x = trained(UBN(4)), torch.randn(2, 4, 8, 8)
    folded, sizes = fold(layer), [(8, 8), (7, 8)]
    expected, compiled = folded(x), torch.compile(fold(layer), backend='eager')
    for model in (folded, compiled, torch.nn.Sequential(folded)):
        torch.testing.assert_close(model(x), expected)
        with image_areas(sizes, (8, 8)):
            with pytest.raises(RuntimeError, match=r'^FoldedUBN takes its means.*padded.*mmubn\.fold'):
                model(x)
            with pytest.raises(ValueError, match='not one map of each of the 2 images'):
                model(x[:1])
            torch.testing.assert_close(model(x[:, :, :1, :1]), layer(x[:, :, :1, :1]))  # at stride 8 both fill the map
        with image_areas([(8, 8)] * 2, (8, 8)):
            torch.testing.assert_close(model(x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize('backend', ['cpp', 'torch', 'reference'])
@EACH_LAYER
def test_an_input_of_another_shape_is_refused(make, backend):
    folded = fold(trained(make(8)))
    for shape in ((1, 1, 4, 4), (2, 7, 4, 4), (8, 4, 4), (2, 8, 3, 4, 4), (2, 8), (0, 3, 4, 4)):
        with (
            ops.use_backend(backend),
            pytest.raises(ValueError, match=rf'expected input of shape \(N, 8, H, W\), got \({shape[0]}, .*8 channels'),
        ):
            folded(torch.zeros(shape))
    with pytest.raises(ValueError, match=r'expected a tensor of shape \(N, 8, H, W\), got a list; .*as_tensor'):
        folded([1.0])


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_other_devices_and_tracers():
    folded, x = fold(trained(UBN(4))), torch.randn(2, 4, 5, 6)
    expected = folded(x)
    assert copy.deepcopy(folded).to('meta')(x.to('meta')).shape == x.shape
    for other in (torch.jit.trace(folded, x), torch.jit.script(folded)):
        torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(torch.func.vmap(folded)(x[None])[0], expected)


# --- the export -------------------------------------------------------------------------------------------------------


def to_onnx(model, path, channels):
    example = torch.randn(2, channels, 8, 9)
    with torch.no_grad():
        torch.onnx.export(
            model, (example,), path, input_names=['x'], dynamic_shapes=DYNAMIC, dynamo=True, verbose=False
        )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix('.optimized.onnx'))
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    optimized = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return optimized, lambda x: torch.as_tensor(session.run(None, {'x': x.numpy()})[0])


@pytest.mark.parametrize(
    ('norm', 'nodes'),
    [
        (UBN, 4),  # mean, addition, product, convolution
        (RBN, 4),  # mean, addition, product, addition
        (BNET, 2),  # addition, convolution
    ],
)
def test_operators_on_the_map(norm, nodes, tmp_path):
    layer = trained(norm(4))
    _, run = to_onnx(fold(layer), tmp_path / 'folded.onnx', 4)
    assert count_map_nodes(tmp_path / 'folded.onnx') == nodes
    x = torch.randn(3, 4, 6, 5)
    torch.testing.assert_close(run(x), layer(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('norm', [UBN, RBN, BNET, IEBN])
def test_folding_takes_operators_off_the_map(norm, tmp_path):
    layer = trained(norm(4))
    counts = []
    for model in (layer, fold(layer)):
        to_onnx(model, tmp_path / 'layer.onnx', 4)
        counts.append(count_map_nodes(tmp_path / 'layer.onnx'))
    assert counts[0] > counts[1]


class TwoReaders(nn.Module):
    """A convolution that a norm and another branch read."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), norm(16)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


def test_onnxruntime_moves_the_mean_into_the_convolution_before(tmp_path):
    """Where nothing else reads the convolution, which the runtime can see."""
    alone = trained(nn.Sequential(nn.Conv2d(3, 16, 3), BNET(16), nn.ReLU()))
    shared = trained(TwoReaders(BNET))
    x = torch.randn(2, 3, 7, 9)
    for name, model in (('alone', alone), ('shared', shared)):
        operators, run = to_onnx(fold(model), tmp_path / f'{name}.onnx', 3)
        torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-4, atol=1e-5)
        if name == 'alone':
            assert {'Conv'} == set(operators) - {'ReorderInput', 'ReorderOutput'}
            assert operators.count('Conv') == 2


# --- fold leaves convolutions alone, whatever stands beside a norm ---------------------------------------------------


class OtherOrder(nn.Module):
    """Registered in one order, called in another."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3), norm(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), norm(4)

    def forward(self, x):
        return self.norm1(self.conv2(F.relu(self.norm2(self.conv1(x)))))


class Shared(nn.Module):
    """A convolution at two places with a norm each, as in RetinaNet's heads."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.conv, self.norms = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.ModuleList([norm(4), norm(4)])

    def forward(self, x):
        return self.norms[1](self.conv(F.relu(self.norms[0](self.conv(self.first(x))))))


class Mixed(nn.Module):
    """BatchNorm and another norm in one block."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4))

    def forward(self, x):
        return self.body(x)


def after(layer):
    return lambda norm: nn.Sequential(layer, norm(4))


def hooked(norm):
    conv = nn.Conv2d(3, 4, 3)
    conv.register_forward_hook(lambda module, inputs, output: output.abs())
    return nn.Sequential(conv, norm(4))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


MODELS = {
    'other order': OtherOrder,
    'shared convolution': Shared,
    'two readers': TwoReaders,
    'mixed': Mixed,
    'activation between': lambda norm: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), norm(4)),
    'no convolution': lambda norm: nn.Sequential(norm(3), nn.Conv2d(3, 4, 3)),
    'groups': lambda norm: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2), norm(4)),
    'transposed': after(nn.ConvTranspose2d(3, 4, 3, stride=2)),
    'padded': after(nn.Conv2d(3, 4, 3, padding=2, bias=False)),
    'reflected': after(nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect')),
    'standardized': after(Standardized(3, 4, 3)),
    'parametrized': after(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    'hooked': hooked,
}


@torch.no_grad()
@pytest.mark.parametrize('norm', [UBN, BNET, RBN, IEBN, UnitizedBN])
@pytest.mark.parametrize('make', MODELS.values(), ids=MODELS)
def test_networks(make, norm):
    model, x = trained(make(norm)), torch.randn(2, 3, 9, 8)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model.to(dtype)
        folded = fold(model)
        torch.testing.assert_close(folded(x.to(dtype)), model(x.to(dtype)), rtol=tolerance, atol=tolerance)
        before = {name: value for name, value in model.state_dict().items() if 'norm' not in name}
        after_folding = folded.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                for key in module.state_dict():
                    assert torch.equal(after_folding[f'{name}.{key}'], before[f'{name}.{key}'])
    assert not any(type(module) is norm for module in folded.modules() if norm is not UnitizedBN)
    assert norm is UnitizedBN or any(isinstance(module, FoldedUBN) for module in folded.modules())
