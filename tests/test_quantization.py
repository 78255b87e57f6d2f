"""Integers around the norms: torch's quantization by graph and in eager mode, and that of onnxruntime."""

import copy

import onnxruntime
import pytest
import torch
from helpers import batch, randomize
from networks import TYPES
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

from mmubn import IEBN, UBN, UnitizedBN, fold
from mmubn.deploy import FoldedUBN

SHAPE = (8, 3, 9, 8)
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')  # of torch.ao


class Net(nn.Module):
    """A norm between two convolutions."""

    def __init__(self, norm, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.norm = norm(channels)
        self.relu = nn.ReLU()
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, x):
        return self.last(self.relu(self.norm(self.conv(x))))


def network(norm):
    """With parameters and running statistics that make every term count."""
    torch.manual_seed(0)
    return randomize(Net(norm)).eval()


def without_pooled_features(model):
    """The same network whose norm has no term that depends on the means of the maps."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in ('center_weight', 'scale_weight'):
            if getattr(model.norm, name) is not None:
                getattr(model.norm, name).zero_()
    return model


def images(seed=0):
    """Maps with means of their own, so that there is something in the pooled features."""
    return batch(SHAPE, seed) + 2 * batch((*SHAPE[:2], 1, 1), seed + 100)


def rms(x):
    return float(x.detach().square().mean().sqrt())


def with_observers(model, qat=False):
    prepare, qconfig = quantize_fx.prepare_fx, quantization.get_default_qconfig_mapping
    if qat:
        prepare, qconfig = quantize_fx.prepare_qat_fx, quantization.get_default_qat_qconfig_mapping
    return prepare(copy.deepcopy(model), qconfig('x86'), (images(),))


@torch.no_grad()
def quantize(model):
    prepared = with_observers(model)
    for seed in range(4):
        prepared(images(seed))
    return quantize_fx.convert_fx(prepared)


def rounding_of(quantized, model):
    """What rounding alone does to the outputs, RMS: the float network, with noise of one step wherever int8 rounds."""
    generator = torch.Generator().manual_seed(0)

    def rounded(x, step):
        return x + step * (torch.rand(x.shape, generator=generator) - 0.5)

    noisy = copy.deepcopy(model)
    scales = [float(getattr(quantized, name)) for name in vars(quantized) | quantized._buffers if '_scale_' in name]
    assert len(scales) == 2, 'of the image, and after the norm'
    for name in ('conv', 'last'):
        layer, integers = getattr(noisy, name), getattr(quantized, name)
        steps = integers.weight().q_per_channel_scales().float()[:, None, None, None]
        layer.weight.data = rounded(layer.weight.data, steps)
        layer.register_forward_hook(lambda *call, step=integers.scale: rounded(call[-1], step))
    noisy.norm.register_forward_hook(lambda *call: rounded(call[-1], scales[1]))
    with torch.no_grad():
        return rms(noisy(rounded(images(9), scales[0])) - model(images(9)))


class Batches(CalibrationDataReader):
    def __init__(self):
        self._batches = iter([{'x': images(seed).numpy()} for seed in range(4)])

    def get_next(self):
        return next(self._batches, None)


def to_onnx(model, path):
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.onnx.export(program, f=path, dynamo=True, input_names=['x'], opset_version=21, verbose=False)


def quantize_onnx(path, activations, weights):
    """A function that runs it."""
    out = path.with_name('integers.onnx')
    quantize_static(path, out, Batches(), per_channel=True, activation_type=activations, weight_type=weights)
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    return lambda x: torch.as_tensor(session.run(None, {'x': x.numpy()})[0])


def watch(layer):
    """The inputs and outputs of a layer from now on."""
    calls = []
    layer.register_forward_hook(lambda module, args, y: calls.append((args[0], y)))
    return calls


@pytest.mark.parametrize('norm', TYPES)
class TestGraph:
    """The norm stays a float layer between integers, folded or not."""

    def test_folded(self, norm):
        model = network(norm)
        folded = fold(model)
        quantized = quantize(folded)
        assert 'quantized' in type(quantized.conv).__module__
        assert type(quantized.norm) is (UnitizedBN if norm is UnitizedBN else FoldedUBN)
        x = images(9)
        error, bound = rms(quantized(x) - model(x)), 1.3 * rounding_of(quantized, folded)
        assert error < bound
        pooled = rms(without_pooled_features(model)(x) - model(x))
        if model.norm.scale_weight is not None:
            assert pooled > 2 * bound, 'an int8 network without them would be seen'
            assert rms(quantize(fold(without_pooled_features(model)))(x) - model(x)) > bound

    def test_not_folded(self, norm):
        """It computes in float what it is given, and may be folded later."""
        model = network(norm)
        quantized = quantize(model)
        assert type(quantized.norm) is norm
        calls, x = watch(quantized.norm), images(9)
        y = quantized(x)
        ((received, returned),) = calls
        assert received.dtype == torch.float32
        torch.testing.assert_close(returned, model.norm(received))
        folded = fold(quantized)
        assert not isinstance(folded.norm, norm) or norm is UnitizedBN
        # One step: a float that lies between two integers may go to either.
        assert float((folded(x) - y).abs().max()) <= 1.001 * quantized.last.scale

    def test_training_with_fake_integers(self, norm):
        model = network(norm).train()
        prepared = with_observers(model, qat=True)
        calls, expected = watch(prepared.norm), copy.deepcopy(model.norm)
        optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
        for seed in range(3):
            optimizer.zero_grad()
            prepared(images(seed)).square().mean().backward()
            received, returned = calls.pop()
            torch.testing.assert_close(returned, expected(received))
            assert all(parameter.grad.abs().sum() > 0 for parameter in prepared.norm.parameters())
            optimizer.step()
            expected.load_state_dict(prepared.norm.state_dict())
        assert prepared.norm.num_batches_tracked == model.norm.num_batches_tracked + 3
        quantized = quantize_fx.convert_fx(prepared.eval())
        assert 'quantized' in type(quantized.conv).__module__
        calls = watch(quantized.norm)
        quantized(images(9))
        ((received, returned),) = calls
        torch.testing.assert_close(returned, expected.eval()(received))
        assert type(fold(quantized).norm) is (UnitizedBN if norm is UnitizedBN else FoldedUBN)

    def test_of_eager_mode_it_says_what_to_do(self, norm):
        """There a layer would be handed integers."""
        model = network(norm)
        for name, net in ((norm.__name__, model), (type(fold(model).norm).__name__, fold(model))):
            net = nn.Sequential(quantization.QuantStub(), net, quantization.DeQuantStub()).eval()
            net.qconfig = quantization.get_default_qconfig('x86')
            prepared = quantization.prepare(net)
            prepared(images())
            with pytest.raises(ValueError, match=rf'^{name} expected a floating point .* torch\.quint8; .*prepare_fx'):
                quantization.convert(prepared)(images())

    def test_it_is_not_fused_away(self, norm):
        model = network(norm)
        for net in (model, fold(model)):
            with pytest.raises((AssertionError, NotImplementedError), match=type(net.norm).__name__):
                quantization.fuse_modules(net, ['conv', 'norm'])
            with pytest.raises((AssertionError, NotImplementedError), match=type(net.norm).__name__):
                quantization.fuse_modules_qat(copy.deepcopy(net).train(), ['conv', 'norm'])
        x = images()
        torch.testing.assert_close(quantize_fx.fuse_fx(model)(x), model(x))


def test_what_folds_to_a_batch_norm_is_integers_throughout():
    """The convolution takes it in."""
    model = network(UBN)
    with torch.no_grad():
        for name in ('center_weight', 'scale_weight', 'neighbor_weight'):
            getattr(model.norm, name).zero_()
    assert type(fold(model).norm) is nn.BatchNorm2d
    quantized, x = quantize(fold(model)), images(9)
    assert not hasattr(quantized, 'norm')
    operators = [node.target for node in quantized.graph.nodes if node.op == 'call_method']
    assert operators == ['dequantize'], 'of the output'
    assert rms(quantized(x) - model(x)) < 0.1 * rms(model(x))


@pytest.mark.parametrize('norm', [UBN, IEBN, UnitizedBN])
def test_onnx(norm, tmp_path):
    """Integers of 16 bits have 256 steps for each of 8: an error that is rounding alone is that much smaller."""
    model, x = network(norm), images(9)
    y = model(x).detach()
    to_onnx(fold(model), tmp_path / 'float.onnx')
    error, finer = (
        rms(quantize_onnx(tmp_path / 'float.onnx', *types)(x) - y)
        for types in ((QuantType.QUInt8, QuantType.QInt8), (QuantType.QUInt16, QuantType.QInt16))
    )
    assert 128 < error / finer < 512
    assert rms(without_pooled_features(model)(x) - y) > 4 * error, 'an int8 network without them would be seen'
