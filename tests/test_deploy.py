"""What happens to the norms after training: torch.compile, torch.export, ONNX, and fold."""

import collections
import copy
import functools
import re
import subprocess
import sys
from pathlib import Path

import mmpretrain
import onnx
import onnxruntime
import pytest
import torch
from helpers import randomize
from mmcv.cnn import fuse_conv_bn
from mmdet.models.backbones import ResNet
from mmengine.config import Config
from networks import Net
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.feature_extraction import create_feature_extractor

from mmubn import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN
from mmubn.deploy import FoldedUBN, fold

OPTIONS = {
    'default': {},
    'no gate': dict(threshold=None),
    'no centering': dict(centering=False),
    'no scaling': dict(scaling=False),
    'pointwise': dict(kernel_size=1),
    '5x5': dict(kernel_size=5),
    'bias calibrated': dict(calibrate_bias=True),
    'only the gate': dict(centering=False, scaling=False, kernel_size=1),
}
LAYERS = {
    **{f'UBN {name}': functools.partial(UBN, **options) for name, options in OPTIONS.items()},
    'SyncUBN': SyncUBN,
    'RBN': RBN,
    'BNET': BNET,
    'BNET 5x5': functools.partial(BNET, kernel_size=5),
    'IEBN': IEBN,
    'UnitizedBN': UnitizedBN,
}
CENTER, SCALE, NEIGHBORS = 'center_weight', 'scale_weight', 'neighbor_weight'
DYNAMIC = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs' / 'deployment.md'
CONFIG = ROOT / 'configs' / 'digits' / 'resnet18-ubn_digits.py'
TOOL = ROOT / 'tools' / 'dataset_converters' / 'digits_to_imagefolder.py'


@pytest.fixture(autouse=True)
def _compile_from_scratch():
    torch._dynamo.reset()
    torch.manual_seed(0)


def set_zero(layer, names):
    with torch.no_grad():
        for name in names:
            if getattr(layer, name) is not None:
                getattr(layer, name).zero_()
    return layer


def resnet(depth, norm='UBN', **options):
    """A network with random parameters in its norms, whose running statistics are those of random images."""
    torch.manual_seed(depth)
    net = ResNet(depth, norm_cfg=dict(type=norm), norm_eval=False, **options)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for seed, layer in enumerate(norms):
        randomize(layer, 0.1, seed).momentum = None
    with torch.no_grad():
        net(torch.randn(8, 3, 64, 64))
    for layer in norms:
        layer.momentum = 0.1
    net.eval()
    return net


@pytest.fixture(scope='module')
def resnet50():
    return resnet(50)


def assert_close_to_max(found, expected, tolerance):
    """Outputs of a whole network: differences relative to the largest value of the map."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        error = float((torch.as_tensor(one) - other).abs().max() / other.abs().max())
        assert error < tolerance, f'{error:.1e} of the maximum'


def export(model, example):
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=DYNAMIC)


def to_onnx(program, path, **arguments):
    """The operators of the graph, and a function that runs it."""
    torch.onnx.export(program, f=path, dynamo=True, input_names=['x'], verbose=False, **arguments)
    graph = onnx.load(path).graph
    operators = collections.Counter(node.op_type for node in graph.node)
    assert 'running_similarity' not in {tensor.name.split('.')[-1] for tensor in graph.initializer}
    assert not operators.keys() & {'Greater', 'GreaterOrEqual', 'Less', 'LessOrEqual', 'Where', 'If'}
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return operators, lambda x: session.run(None, {'x': x.numpy()})


def check_compiled(eager, backend):
    """A layer against its compiled copy while the gate closes and opens again. Returns the counts of batches."""
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    moved = []
    for similarity in (0.9, -0.9, -0.9, 0.9):
        x = torch.randn(3, 4, 6, 5, dtype=eager.weight.dtype)
        inputs, outputs = [x.clone().requires_grad_() for _ in range(2)], []
        for run, module, value in zip((compiled, eager), (layer, eager), inputs, strict=True):
            module.running_similarity.fill_(similarity)
            module.zero_grad()
            y = run(value)
            (y * y.detach().cos()).sum().backward()
            outputs.append(y)
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
        for name, parameter in eager.named_parameters():
            torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
        for name, buffer in eager.named_buffers():
            torch.testing.assert_close(layer.get_buffer(name), buffer)
        moved.append(int(layer.num_batches_tracked))
    return moved


class TestCompile:
    @pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
    def test_training_is_one_graph_for_both_states_of_the_gate(self, options):
        counter = CompileCounterWithBackend('aot_eager')
        moved = check_compiled(randomize(UBN(4, **options)), counter)
        assert counter.frame_count == 1
        assert moved == ([1, 2, 3, 4] if 'threshold' in options else [1, 1, 1, 2]), 'the gate closes and opens again'

    def test_training_in_float64(self):
        check_compiled(randomize(UBN(4).double()), 'aot_eager')

    @pytest.mark.slow
    def test_training_with_inductor(self):
        check_compiled(randomize(UBN(4)), 'inductor')

    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_one_dynamic_graph_for_all_sizes(self, training):
        eager = randomize(UBN(4)).train(training)
        counter = CompileCounterWithBackend('aot_eager')
        compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=counter)
        for shape in ((4, 4, 8, 9), (6, 4, 10, 7), (2, 4, 5, 12), (9, 4, 6, 6), (3, 4, 20, 2)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), eager(x))
        assert counter.frame_count == 2, 'one of the first size, one dynamic'

    @pytest.mark.slow
    def test_resnet18(self):
        eager = resnet(18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
        net = copy.deepcopy(eager)
        counter = CompileCounterWithBackend('aot_eager')
        compiled = torch.compile(net, fullgraph=True, backend=counter)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert_close_to_max(compiled(x), eager(x), 1e-4)
        for run, module in ((compiled, net), (eager, eager)):
            module.train()
            sum(y.square().mean() for y in run(x)).backward()
        gradients = [[p.grad for p in module.parameters()] for module in (net, eager)]
        assert_close_to_max(*gradients, 1e-3)
        for name, buffer in eager.named_buffers():
            torch.testing.assert_close(net.get_buffer(name), buffer, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 2, 'one graph for evaluation, one for training'


def gate_operations(program):
    """Comparisons and choices in an exported program: what a gate is made of."""
    names = [
        node.target.overloadpacket.__name__
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    ]
    assert names
    return set(names) & {'gt', 'ge', 'lt', 'le', 'where', 'copy_'}


class TestExport:
    SIZES = [(1, 4, 5, 5), (3, 4, 1, 1), (5, 4, 20, 7)]

    @pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
    def test_layer(self, options, tmp_path):
        layer = randomize(UBN(4, **options)).eval()
        program = export(layer, torch.randn(2, 4, 8, 9))
        assert not gate_operations(program)
        assert not program.graph_signature.buffers_to_mutate
        buffers = program.graph_signature.inputs_to_buffers
        used = {buffers[node.name]: bool(node.users) for node in program.graph.nodes if node.name in buffers}
        assert {name for name, is_used in used.items() if is_used} == {'running_mean', 'running_var'}
        assert used.keys() == dict(layer.named_buffers()).keys()
        _, run = to_onnx(program, tmp_path / 'layer.onnx', opset_version=18)
        for size in self.SIZES:
            x = torch.randn(size)
            expected = layer(x).detach()
            torch.testing.assert_close(program.module()(x).detach(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.as_tensor(run(x)[0]), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize('norm', [RBN, BNET, IEBN, UnitizedBN])
    def test_other_types(self, norm, tmp_path):
        layer = randomize(norm(4)).eval()
        program = export(layer, torch.randn(2, 4, 8, 9))
        assert not gate_operations(program)
        _, run = to_onnx(program, tmp_path / 'layer.onnx', opset_version=18)
        for size in self.SIZES:
            x = torch.randn(size)
            expected = layer(x).detach()
            torch.testing.assert_close(program.module()(x).detach(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.as_tensor(run(x)[0]), expected, rtol=1e-5, atol=1e-5)

    def test_the_gate_of_training_would_be_seen(self):
        assert gate_operations(export(UBN(4), torch.randn(2, 4, 8, 9))) >= {'gt', 'where'}

    @pytest.mark.slow
    @pytest.mark.parametrize('prepare', [lambda net: net, fold], ids=['as trained', 'folded'])
    def test_resnet50(self, resnet50, prepare, tmp_path):
        program = export(prepare(resnet50), torch.randn(2, 3, 64, 64))
        assert not gate_operations(program)
        _, run = to_onnx(program, tmp_path / 'net.onnx')
        with torch.no_grad():
            for size in ((1, 3, 64, 64), (3, 3, 96, 64), (2, 3, 72, 136)):
                x = torch.randn(size)
                expected = resnet50(x)
                assert_close_to_max(program.module()(x), expected, 1e-4)
                assert_close_to_max(run(x), expected, 1e-4)


@torch.no_grad()
def test_an_image_is_evaluated_alike_in_any_batch(resnet50):
    images = torch.randn(4, 3, 64, 96)
    together = resnet50(images)
    for i in range(len(images)):
        assert_close_to_max(resnet50(images[i : i + 1]), [y[i : i + 1] for y in together], 1e-4)
    pair = resnet50(images[[2, 0]])
    assert_close_to_max(pair, [y[[2, 0]] for y in together], 1e-4)


class TestFold:
    ZEROS = [(), (SCALE,), (CENTER,), (CENTER, SCALE), (NEIGHBORS,), (NEIGHBORS, CENTER, SCALE)]

    @pytest.mark.parametrize('zeros', ZEROS, ids=lambda zeros: '+'.join(zeros) or 'none')
    @pytest.mark.parametrize('norm', LAYERS.values(), ids=LAYERS)
    def test_layer(self, norm, zeros):
        layer = set_zero(randomize(norm(4)), zeros).eval()
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            layer.to(dtype)
            folded = fold(layer)
            # 1x1 and 2x5 are all border: the zeros around the map stand for the mean, not for 0.
            for shape in ((3, 4, 6, 5), (2, 4, 1, 1), (1, 4, 2, 5), (0, 4, 3, 3), (2, 4, 0, 3)):
                x = 2 * torch.randn(shape, dtype=dtype) + 3
                torch.testing.assert_close(folded(x), layer(x).detach(), rtol=tolerance, atol=tolerance)
            if type(folded) is not UnitizedBN:
                assert not any(p.requires_grad for p in folded.parameters())

    @pytest.mark.parametrize(
        ('norm', 'zeros', 'kind', 'operators'),
        [
            (UBN, (CENTER, SCALE), FoldedUBN, {'Add': 1, 'Conv': 1}),
            (functools.partial(UBN, centering=False, scaling=False), (), FoldedUBN, {'Add': 1, 'Conv': 1}),
            (UBN, (CENTER, SCALE, NEIGHBORS), nn.BatchNorm2d, {'BatchNormalization': 1}),
            (functools.partial(UBN, kernel_size=1), (CENTER, SCALE), nn.BatchNorm2d, {'BatchNormalization': 1}),
            (
                functools.partial(UBN, calibrate_bias=True),
                (CENTER, SCALE, NEIGHBORS),
                nn.BatchNorm2d,
                {'BatchNormalization': 1},
            ),
            (UBN, (), FoldedUBN, None),
            (UBN, (NEIGHBORS,), FoldedUBN, None),
            (RBN, (), FoldedUBN, None),
            (RBN, (CENTER, SCALE), nn.BatchNorm2d, {'BatchNormalization': 1}),
            (BNET, (), FoldedUBN, {'Add': 1, 'Conv': 1}),
            (BNET, (NEIGHBORS,), nn.BatchNorm2d, {'BatchNormalization': 1}),
            (IEBN, (), FoldedUBN, None),
            (IEBN, (SCALE,), nn.BatchNorm2d, {'BatchNormalization': 1}),
            (UnitizedBN, (), UnitizedBN, None),
            (UnitizedBN, (SCALE,), nn.BatchNorm2d, {'BatchNormalization': 1}),
        ],
    )
    def test_form(self, norm, zeros, kind, operators, tmp_path):
        layer = set_zero(randomize(norm(4)), zeros).eval()
        folded = fold(layer)
        assert type(folded) is kind
        program = export(folded, torch.randn(2, 4, 8, 9))
        found, run = to_onnx(program, tmp_path / 'layer.onnx')
        assert operators is None or found == operators
        for size in TestExport.SIZES:
            x = torch.randn(size)
            expected = layer(x).detach()
            torch.testing.assert_close(program.module()(x).detach(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.as_tensor(run(x)[0]), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize('norm', [UBN, RBN, BNET, IEBN, UnitizedBN])
    @pytest.mark.parametrize('zeros', ZEROS, ids=lambda zeros: '+'.join(zeros) or 'none')
    def test_mixed_precision(self, norm, zeros):
        layer = set_zero(randomize(norm(4)), zeros).eval()
        folded = fold(layer)
        x = torch.randn(3, 4, 6, 5)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = folded(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, folded(x), rtol=0, atol=0)
        for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            half_x, half_layer = x.to(dtype), copy.deepcopy(layer).to(dtype)
            for one, other in ((folded, layer), (fold(half_layer), half_layer)):
                y = one(half_x)
                assert y.dtype == dtype
                torch.testing.assert_close(y, other(half_x).detach(), rtol=tolerance, atol=tolerance)
            # Constants that are rounded after folding differ by one rounding more.
            y = copy.deepcopy(folded).to(dtype)(half_x)
            assert y.dtype == dtype
            torch.testing.assert_close(y, folded(half_x), rtol=5 * tolerance, atol=5 * tolerance)

    @pytest.mark.parametrize('norm', [UBN, RBN, BNET, IEBN])
    def test_a_mean_that_is_large_beside_the_deviation_loses_no_digits(self, norm):
        layer = randomize(norm(4)).eval()
        layer.running_mean.fill_(3000)
        if norm is IEBN:
            layer.scale_weight.data /= 3000  # or the sigmoid would be 0 or 1
        x = torch.randn(3, 4, 6, 5) + 3000
        exact = copy.deepcopy(layer).double()(x.double())
        torch.testing.assert_close(fold(layer)(x).double(), exact, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('norm', [UBN, RBN, BNET, IEBN, UnitizedBN])
    def test_the_model_stays_as_it_is_and_the_copy_holds_none_that_folds(self, norm):
        shared = randomize(norm(4))
        other = nn.BatchNorm2d(4)
        model = nn.ModuleDict(dict(a=nn.Sequential(shared, nn.ReLU()), b=shared, c=other)).eval()
        before = copy.deepcopy(model.state_dict())
        folded = fold(model)
        assert model['b'] is shared
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert isinstance(folded['b'], UnitizedBN if norm is UnitizedBN else FoldedUBN)
        assert folded['b'] is not shared
        assert folded['a'][0] is folded['b'], 'a shared layer stays shared'
        assert type(folded['c']) is nn.BatchNorm2d
        assert not any(module.training for module in folded.modules())
        assert fold(folded)['b'](torch.zeros(1, 4, 2, 2)).shape == (1, 4, 2, 2)

    @pytest.mark.parametrize(('model', 'kind'), [(3, 'an int'), (None, 'None'), (len, 'a builtin_function_or_method')])
    def test_what_is_no_model_is_an_error(self, model, kind):
        with pytest.raises(TypeError, match=rf'^fold expected a model, an nn\.Module .*, got {kind}\.$'):
            fold(model)

    def test_a_model_without_norms_of_this_package(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        folded, x = fold(model), torch.randn(2, 3, 4, 4)
        assert folded is not model
        assert torch.equal(folded(x), model(x))

    @pytest.mark.parametrize('norm', [UBN, IEBN])
    def test_training_mode_is_an_error(self, norm):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4))
        with pytest.raises(ValueError, match=r'call model\.eval\(\)'):
            fold(model)
        model.eval()[1].train()
        with pytest.raises(ValueError, match=r'call model\.eval\(\)'):
            fold(model)
        fold(model.eval())

    @pytest.mark.parametrize('norm', [UBN, RBN, BNET, IEBN, UnitizedBN])
    def test_it_is_one_node_of_a_traced_graph(self, norm):
        model = Net(norm)
        randomize(model.bn)
        folded = fold(model.eval())
        x = torch.randn(2, 3, 7, 6)
        traced = torch.fx.symbolic_trace(folded)
        assert [node.op for node in traced.graph.nodes if node.target == 'bn'] == ['call_module']
        torch.testing.assert_close(traced(x), model(x))
        features = create_feature_extractor(folded, ['bn'])(x)['bn']
        torch.testing.assert_close(features, model.bn(model.conv(x)))

    @pytest.mark.parametrize('norm', LAYERS.values(), ids=LAYERS)
    def test_without_running_statistics_nothing_is_constant(self, norm):
        layer = randomize(norm(4, track_running_stats=False)).eval()
        folded = fold(layer)
        assert type(folded) is type(layer)
        x = torch.randn(3, 4, 6, 5)
        assert torch.equal(folded(x), layer(x))

    def test_an_input_of_integers_is_refused(self):
        folded = fold(randomize(UBN(4)).eval())
        with pytest.raises(ValueError, match=r'^FoldedUBN expected a floating point .* torch\.int64; .*float\(\)'):
            folded(torch.ones(2, 4, 3, 3, dtype=torch.int64))

    @torch.no_grad()
    def test_resnet50(self, resnet50):
        folded = fold(resnet50)
        assert sum(isinstance(module, FoldedUBN) for module in folded.modules()) == 53
        for size in ((1, 3, 64, 64), (2, 3, 96, 72)):
            x = torch.randn(size)
            assert_close_to_max(folded(x), resnet50(x), 1e-4)

    @torch.no_grad()
    def test_resnet50_of_a_batch_norm_checkpoint(self):
        """It becomes the BatchNorm network again, and conv-BN fusion, wrong on UBN, is right on it."""
        batch_norm = resnet(50, 'BN')
        net = ResNet(50, norm_cfg=dict(type='UBN'))
        net.load_state_dict(batch_norm.state_dict())
        net.eval()
        folded = fold(net)
        assert not any(isinstance(module, FoldedUBN) for module in folded.modules())
        x = torch.randn(2, 3, 64, 96)
        expected = batch_norm(x)
        assert_close_to_max(folded(x), expected, 1e-4)
        fused = fuse_conv_bn(folded)
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
        assert_close_to_max(fused(x), expected, 1e-4)


def python_blocks():
    return re.findall(r'```python\n(.*?)```', DOCS.read_text(), re.DOTALL)


def test_the_blocks_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in python_blocks() if not block.startswith('# needs: ')]
    assert len(blocks) == 7
    names = {}
    exec(compile('\n'.join(blocks), str(DOCS), 'exec'), names)
    image = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = names['model'](image)
    found = names['session'].run(None, {'image': image.numpy()})
    assert_close_to_max(found, expected, 1e-4)
    assert_close_to_max(torch.export.load('backbone.pt2').module()(image), expected, 1e-4)

    session = onnxruntime.InferenceSession('backbone-int8.onnx', providers=['CPUExecutionProvider'])
    calibrated = names['image']
    with torch.no_grad():  # 53 layers round to some 200 steps each: what matters is that these networks are the same
        expected = names['model'](calibrated)
        assert_close_to_max(names['int8'](calibrated), expected, 0.15)
    assert_close_to_max(session.run(None, {'image': calibrated.numpy()}), expected, 0.15)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_measurement_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    """On a few digits, with networks that have learnt nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    *_, int8, _, measurement = python_blocks()
    Path('int8.py').write_text(int8)
    runs = Path('work_dirs/demo-classification')
    subprocess.run(
        [sys.executable, TOOL, runs / 'digits', '--train-per-class', '6', '--val-per-class', '8'], check=True
    )
    for norm in ('UBN', 'BN'):
        cfg = Config.fromfile(CONFIG)
        cfg.model.backbone.norm_cfg.type = norm
        run = runs / f'{norm.lower()}-seed0'
        run.mkdir()
        cfg.dump(run / CONFIG.name)
        network = mmpretrain.get_model(cfg, pretrained=False)
        randomize(network.backbone, 0.1)
        torch.save(dict(state_dict=network.state_dict()), run / 'epoch_6.pth')
    exec(compile(measurement, str(DOCS), 'exec'), {})
    sys.modules.pop('int8')
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert [line.count('|') for line in lines] == [7] * 11, 'a title and five networks of each norm'
    assert lines[0] in DOCS.read_text()
