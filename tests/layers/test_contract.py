"""One contract for all norm types: what UBN guarantees, every type of the package guarantees."""

import copy
import inspect
import pickle
import re

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, TOLERANCES, batch, randomize
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.norm import infer_abbr
from mmengine.model import initialize
from mmengine.optim import DefaultOptimWrapperConstructor
from norms import (
    CENTER,
    GATE,
    GATED_SHAPES,
    NEIGHBORS,
    SCALE,
    SHAPES,
    SIGMOID_1,
    SIGMOID_MINUS_1,
    Norm,
    buffers,
    check_against_oracle,
    check_derivatives,
    check_training_then_evaluation,
    run_oracle,
    training_batches,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from mmubn.layers import BNET, IEBN, RBN, UBN, SyncUBN, UnitizedBN

TYPES = {
    'RBN': Norm(RBN, CENTER | SCALE, 'rectified', SIGMOID_1),
    'BNET': Norm(BNET, NEIGHBORS),
    'IEBN': Norm(IEBN, SCALE, 'instance', SIGMOID_MINUS_1),
    'UnitizedBN': Norm(UnitizedBN, {'scale_weight'}, 'unitized', shapes=(*SHAPES, (5, 3), (2, 1))),
    'UBN': Norm(UBN, NEIGHBORS | CENTER | SCALE, 'rectified', SIGMOID_1, GATE, GATED_SHAPES),
    'SyncUBN': Norm(SyncUBN, NEIGHBORS | CENTER | SCALE, 'rectified', SIGMOID_1, GATE, GATED_SHAPES),
}
NORMS = TYPES | {f'BNET {k}x{k}': TYPES['BNET']._replace(options=dict(kernel_size=k)) for k in (5, 7)}


@pytest.mark.parametrize('norm', NORMS.values(), ids=NORMS)
class TestContract:
    # --- the function -------------------------------------------------------------------------------------------------

    def test_training_steps_then_evaluation(self, norm, backend):
        check_training_then_evaluation(norm)

    @pytest.mark.parametrize('memory_format', LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize('dtype', TOLERANCES, ids=lambda dtype: str(dtype).removeprefix('torch.'))
    def test_dtypes_and_layouts(self, norm, backend, dtype, memory_format):
        """Of the input and, separately, of the layer: a float32 layer takes any input, as under autocast."""
        # Samples of seed 45 differ by 0.8 and more: the variance of two values, where they are near, is near eps.
        for layer_dtype in {torch.float32, dtype}:
            for shape, seed in (((3, 5, 4, 7), 1), ((2, 8, 1, 1), 45)):
                layer = randomize(norm(shape[1])).to(layer_dtype)
                for training in (True, False):
                    x = batch(shape, seed, dtype=dtype).contiguous(memory_format=memory_format)
                    check_against_oracle(norm, layer.train(training), x)

    def test_any_strides(self, norm, backend):
        """Of the input and of the gradient: slices, expanded dimensions, and layouts that differ between the two."""
        wide = batch((4, 3, 12, 10), dtype=torch.float64)
        inputs = [wide[:, :, ::2, 1::2], wide.transpose(2, 3), batch((4, 3, 1, 1), dtype=torch.float64).expand_as(wide)]
        for x in inputs:
            layer = randomize(norm(3)).double()
            check_against_oracle(norm, layer, x)
        x, grad = inputs[0], torch.linspace(-1, 2, 5, dtype=torch.float64).expand(4, 3, 6, 5)
        for layout in LAYOUTS.values():
            layer = randomize(norm(3)).double()
            value = x.contiguous(memory_format=layout).requires_grad_()
            _, expected, _ = run_oracle(norm, layer, value, grad, buffers(layer))
            layer(value).backward(grad)
            for name, g in expected.items():
                found = value.grad if name == 'x' else layer.get_parameter(name).grad
                torch.testing.assert_close(found, g, msg=lambda m, name=name: f'gradient of {name}: {m}')

    def test_gradients_of_gradients(self, norm, backend):
        check_derivatives(norm)

    def test_frozen_parts(self, norm, backend):
        """Without gradients of the parameters, or of the input, the others are as ever."""
        x = batch()
        whole = randomize(norm(3))
        value = x.clone().requires_grad_()
        (whole(value) * batch(seed=1)).sum().backward()

        frozen = randomize(norm(3)).requires_grad_(False)
        frozen_value = x.clone().requires_grad_()
        (frozen(frozen_value) * batch(seed=1)).sum().backward()
        torch.testing.assert_close(frozen_value.grad, value.grad)

        first = randomize(norm(3))  # of a network
        (first(x) * batch(seed=1)).sum().backward()
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(first.get_parameter(name).grad, parameter.grad)
            assert frozen.get_parameter(name).grad is None

    def test_fresh_layer_is_a_constant_times_batch_norm(self, norm):
        x = batch(shared=3.0, dtype=torch.float64)
        ours, theirs = norm(3).double(), nn.BatchNorm2d(3).double()
        torch.testing.assert_close(ours(x), norm.start * theirs(x))
        torch.testing.assert_close(ours.eval()(x), norm.start * theirs.eval()(x))

    # --- mixed precision and large numbers ----------------------------------------------------------------------------

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
    def test_autocast_changes_nothing(self, norm, backend, dtype):
        results = []
        for enabled in (False, True):
            layer, x = randomize(norm(3)), batch().requires_grad_()
            with torch.autocast('cpu', dtype=dtype, enabled=enabled):
                y = layer(x)
                (y * batch(seed=1)).sum().backward()
            results.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype

    def test_a_mean_that_is_large_beside_the_deviation(self, norm, backend):
        def layer_for(mean):
            layer = randomize(norm(3))
            if norm.scaling == 'instance':
                layer.scale_weight.data /= mean  # or its sigmoid would be 0 or 1
            return layer

        check_against_oracle(norm, layer_for(30), batch() + 30)
        # The output alone: float32 rounds w_m a to 1e-4 of the deviation here, and gradients of w_m cancel further.
        layer, x = layer_for(3000), batch() + 3000
        expected, _, _ = run_oracle(norm, layer, x, torch.ones_like(x), buffers(layer))
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=1e-3)

    def test_float16_near_overflow(self, norm, backend):
        layer = norm(4)
        x = (30000 + 20000 * batch((4, 4, 8, 8))).clamp(-65504, 65504).half().requires_grad_()
        y = layer(x)
        if norm.gated:
            similarity = 0.1 + 0.9 * oracle.pairwise_similarity(x.detach())
            assert layer.running_similarity.item() == pytest.approx(similarity, abs=1e-5)
        expected = norm.start * nn.BatchNorm2d(4).double()(x.double())
        torch.testing.assert_close(y.double(), expected, **TOLERANCES[torch.float16])
        y.sum().backward()
        for tensor in (x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()):
            assert tensor.isfinite().all()

    # --- the edges ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_empty_batch(self, norm, backend, training):
        for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 0, 0), *((0, *s[1:]) for s in norm.shapes if len(s) == 2)):
            layer = randomize(norm(shape[1])).train(training)
            before = copy.deepcopy(layer.state_dict())
            x = torch.empty(shape, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert y.shape == x.grad.shape == shape
            for name, parameter in layer.named_parameters():
                assert torch.equal(parameter.grad, torch.zeros_like(parameter)), f'{name} must have a zero gradient'
            assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_a_bad_batch_does_not_stay(self, norm, backend, value):
        layer = randomize(norm(3))
        x = batch()
        x[1, 2, 0, 0] = value
        before = copy.deepcopy(layer.state_dict())
        layer(x)
        moved = layer.running_mean != before['running_mean']
        assert moved.tolist() == [True, True, False], 'channels of finite statistics, and only these, learn from them'
        for buffer in layer.buffers():
            assert buffer.isfinite().all()
        assert not norm.gated or torch.equal(layer.running_similarity, before['running_similarity'])
        check_against_oracle(norm, layer, batch(seed=1))
        check_against_oracle(norm, layer.eval(), batch(seed=2))

    def test_a_half_precision_layer_survives_a_variance_beyond_its_range(self, norm, backend):
        layer = norm(3).half()
        layer(1000 * batch(shared=3.0, dtype=torch.float16))  # a variance of 1e6
        assert torch.equal(layer.running_var, torch.ones(3, dtype=torch.float16))
        x = batch(seed=1, shared=3.0, dtype=torch.float16)
        layer(x)
        assert layer.running_var.ne(1).all()
        assert layer.eval()(x).isfinite().all()

    def test_re_estimation_takes_the_batch(self, norm, backend):
        """By tools that set momentum to None (``update_bn``) or 1 (PreciseBN), whatever a gate says."""
        data = [batch(seed=seed) + seed for seed in range(3)]
        states = []
        for x in data:
            layer = randomize(norm(3))
            parameters = dict(layer.named_parameters())
            states.append(oracle.norm(x.double(), parameters, buffers(layer), scaling=norm.scaling, momentum=1.0)[1])
        layer = randomize(norm(3))
        if norm.gated:
            layer.running_similarity.fill_(-0.9)
        update_bn(data, layer)
        assert (int(layer.num_batches_tracked), layer.momentum) == (3, 0.1)
        if norm.gated:
            assert layer.running_similarity == 1, 'update_bn resets the statistics, and that opens the gate'
            layer.running_similarity.fill_(-0.9)
        for name in ('running_mean', 'running_var'):
            mean = torch.stack([state[name].detach() for state in states]).mean(0)
            torch.testing.assert_close(layer.get_buffer(name).double(), mean, **TOLERANCES[torch.float32])
        layer.momentum = 1.0
        layer(data[0])
        for name in ('running_mean', 'running_var'):
            value = states[0][name].detach()
            torch.testing.assert_close(layer.get_buffer(name).double(), value, **TOLERANCES[torch.float32])
        assert not norm.gated or layer.running_similarity == torch.tensor(-0.9)

    def test_the_input_and_the_output_are_the_callers(self, norm, backend):
        """Nothing writes into the input, and an activation may overwrite the output in place."""
        cases = [(shape, layout) for shape in norm.shapes for layout in LAYOUTS.values() if len(shape) == 4]
        cases += [(shape, None) for shape in norm.shapes if len(shape) == 2] + [((0, 3, 4, 4), None)]
        for shape, layout in cases:
            for training in (True, False):
                results = []
                for inplace in (False, True):
                    layer = randomize(norm(shape[1])).train(training)
                    x = batch(shape, seed=2)
                    x = (x if layout is None else x.contiguous(memory_format=layout)).requires_grad_()
                    before = x.detach().clone()
                    y = F.relu(layer(x), inplace=inplace)
                    (y * torch.linspace(-1, 2, y.numel()).view(shape)).sum().backward()
                    assert torch.equal(x, before)
                    results.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
                for one, other in zip(*results, strict=True):
                    assert torch.equal(one, other), (shape, layout, training)

    @pytest.mark.parametrize('reentrant', [True, False], ids=['reentrant', 'not reentrant'])
    def test_activation_checkpointing(self, norm, backend, reentrant):
        """Two calls, then one backward, as in a shared head; for a gated norm, one with it open and one closed."""
        results = []
        for call in (
            lambda layer, x: layer(x),
            lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant),
        ):
            layer = randomize(norm(3)).double()
            inputs = [x.requires_grad_() for x in training_batches((4, 3, 6, 5), torch.float64)[:2]]
            outputs = [call(layer, x) for x in inputs]
            sum((y * y.detach().cos()).sum() for y in outputs).backward()
            parameters = [p.grad for p in layer.parameters()]
            results.append([*outputs, *(x.grad for x in inputs), *parameters, *layer.buffers()])
        torch.testing.assert_close(*results)
        assert layer.num_batches_tracked == (1 if norm.gated else 2)

    def test_calls_before_one_backward(self, norm, backend):
        """In either mode, as in a shared head. The second of training moves the running statistics of every type."""
        calls = ((False, 0.0), (True, 0.0), (True, 3.0), (False, 0.0))  # training, and what the samples share

        def gradients(together):
            layer, losses = randomize(norm(3)), []
            for seed, (training, shared) in enumerate(calls):
                losses.append(layer.train(training)(batch(seed=seed, shared=shared)).square().sum())
                if not together:
                    losses.pop().backward()
            if together:
                sum(losses).backward()
            assert layer.num_batches_tracked == (1 if norm.gated else 2)
            return [p.grad for p in layer.parameters()]

        torch.testing.assert_close(gradients(True), gradients(False))

    def test_evaluation_moves_nothing_and_does_not_depend_on_the_batch(self, norm, backend):
        layer = randomize(norm(3)).eval()
        before = copy.deepcopy(layer.state_dict())
        x = batch()
        torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]))
        assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())

    def test_no_host_synchronisation(self, norm, backend):
        """Meta tensors hold no values: a decision on the host would raise."""
        for training in (True, False):
            layer = norm(3).to('meta').train(training)
            x = torch.empty(4, 3, 5, 5, device='meta', requires_grad=True)
            layer(x).sum().backward()
            assert x.grad.shape == x.shape

    # --- state --------------------------------------------------------------------------------------------------------

    def test_copies_continue_as_the_original_does(self, norm):
        """Through a state dict, deepcopy and pickle, taken in the middle of a training step."""
        layer = randomize(norm(3))
        output = layer(batch())
        loaded = norm(3)
        loaded.load_state_dict(layer.state_dict())
        copies = [loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        output.sum().backward()
        layer.zero_grad()
        for x in training_batches((4, 3, 6, 5), torch.float32):
            expected = layer(x)
            for other in copies:
                assert torch.equal(other(x), expected)
                assert all(torch.equal(value, other.state_dict()[key]) for key, value in layer.state_dict().items())

    def test_updates_are_in_place(self, norm):
        """DDP, EMA and CUDA graphs hold references to the buffers."""
        layer = norm(3)
        before = {name: (buffer, buffer.data_ptr(), buffer.clone()) for name, buffer in layer.named_buffers()}
        layer(batch(shared=3.0))
        for name, buffer in layer.named_buffers():
            same, pointer, old = before[name]
            assert buffer is same, name
            assert buffer.data_ptr() == pointer, name
            assert not torch.equal(buffer, old), name

    def test_reset_parameters(self, norm):
        layer = randomize(norm(3))
        layer(batch())
        layer.reset_parameters()
        fresh = norm(3).state_dict()
        assert all(torch.equal(fresh[key], value) for key, value in layer.state_dict().items())

    # --- the ecosystem ------------------------------------------------------------------------------------------------

    def test_is_a_batch_norm(self, norm):
        layer = norm(4)
        assert isinstance(layer, _BatchNorm)
        assert infer_abbr(norm.type) == 'bn', 'pretrained checkpoints name the norms of a ResNet bn1, bn2, bn3'
        assert not list(layer.children()), 'a child would be initialised as a layer of its own'
        assert layer.weight.shape == layer.bias.shape == (4,)
        assert all(parameter.dim() > 0 for parameter in norm(1).parameters()), 'FSDP rejects scalar parameters'
        options = {'eps': 1e-3, 'momentum': 0.2, **norm.options}
        assert repr(norm(4, eps=1e-3, momentum=0.2)).startswith(f'{norm.name}(4, eps=0.001, momentum=0.2')
        for name, value in options.items():
            assert f'{name}={value}' in repr(norm(4, eps=1e-3, momentum=0.2))

    INITIALISERS = [
        dict(type='Constant', val=0.7, bias=0.2, layer=['_BatchNorm', 'GroupNorm']),
        dict(type='Constant', val=0.7, bias=0.2, layer='the type'),
        dict(type='Normal', std=0.5, layer=['Conv2d', '_BatchNorm']),
        dict(type='TruncNormal', std=0.5, layer=['Conv2d', '_BatchNorm']),
        dict(type='Uniform', layer=['Conv2d', '_BatchNorm']),
        dict(type='Xavier', layer='Conv2d'),
        dict(type='Kaiming', layer='Conv2d'),
        dict(type='Caffe2Xavier', layer='Conv2d'),
    ]

    def test_initialisers_meet_a_batch_norm(self, norm):
        """They fill ``weight`` and ``bias``, as BatchNorm's, and meet none of the other parameters."""
        x = batch((4, 4, 6, 5), shared=3.0)
        for init_cfg in self.INITIALISERS:
            model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 2, 1))
            layers = norm.name if init_cfg['layer'] == 'the type' else init_cfg['layer']
            initialize(model, init_cfg | {'layer': layers})
            layer, reference = model[1], nn.BatchNorm2d(4)
            reference.load_state_dict({key: layer.state_dict()[key] for key in reference.state_dict()})
            is_touched = bool(layer.weight.ne(1).all())
            assert is_touched == (layers != 'Conv2d'), f'weight must be filled where, and only where, asked: {init_cfg}'
            if init_cfg['type'] == 'Constant':
                assert layer.weight.eq(0.7).all()
                assert layer.bias.eq(0.2).all()
            bias = reference.bias.detach()[:, None, None]
            torch.testing.assert_close(layer(x), norm.start * (reference(x) - bias) + bias)

    def test_a_conv_module_initialises_it(self, norm):
        x = batch((4, 4, 6, 5), shared=3.0)
        module = ConvModule(3, 4, 3, norm_cfg=dict(type=norm.name, **norm.options))
        module.init_weights()
        torch.testing.assert_close(module.bn(x), norm.start * nn.BatchNorm2d(4)(x))

    def test_zero_initialisation_of_residual_branches(self, norm):
        """What zero_init_residual does to the last norm of a block: the branch is zero, and can start."""
        layer = norm(4)
        nn.init.zeros_(layer.weight)
        y = layer(batch((4, 4, 6, 5), shared=3.0))
        assert y.eq(0).all()
        (y * batch((4, 4, 6, 5), seed=1)).sum().backward()
        for name in {'weight', 'neighbor_weight'} & {'weight', *norm.extra}:
            assert layer.get_parameter(name).grad.abs().min() > 0, name

    def test_weight_decay_rules_meet_a_norm(self, norm):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
        optimizer = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5))
        rules = dict(norm_decay_mult=0.0, bias_lr_mult=2.0, bias_decay_mult=0.5, dwconv_decay_mult=3.0)
        groups = DefaultOptimWrapperConstructor(optimizer, rules)(model).optimizer.param_groups
        found = {id(group['params'][0]): (group['lr'], group['weight_decay']) for group in groups}
        assert {found[id(parameter)] for parameter in model[1].parameters()} == {(0.1, 0.0)}
        assert found[id(model[0].bias)] == (0.2, 0.25)

    # --- bad input ----------------------------------------------------------------------------------------------------

    BAD = dict(
        num_features=[0, -1, 2.5, True, '4'],
        eps=[0, -1e-5, None, 'small', float('inf')],
        momentum=['0.1', -0.1, 1.5, float('nan')],
        affine=[False, None, 1],
        track_running_stats=[None, 0],
        kernel_size=[2, 0, -3, 3.0, (3, 3), None],
    )

    def test_arguments(self, norm):
        """An error names the type, the argument, and the value."""
        names = inspect.signature(norm.type).parameters
        for name, values in self.BAD.items():
            for value in values if name in names else ():
                with pytest.raises(ValueError, match=f'^{norm.name}: {name} must be ') as error:
                    norm.type(**{'num_features': 4, **norm.options, name: value})
                assert repr(value) in str(error.value)
        with pytest.raises(TypeError, match="unexpected keyword argument 'apply_act'"):
            norm(4, apply_act=True)

    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_inputs(self, norm, training):
        """An error names the type, the shapes that it takes, and what it got."""
        layer = norm(4).train(training)
        takes_2d = any(len(shape) == 2 for shape in norm.shapes)
        expected = r'\(N, 4\) or \(N, 4, H, W\)' if takes_2d else r'\(N, 4, H, W\)'
        for shape in (
            (),
            (4,),
            (2, 3) if takes_2d else (2, 4),
            (2, 4, 5),
            (4, 5, 5),
            (2, 4, 5, 5, 5),
            (2, 3, 5, 5),
            (0, 3, 5, 5),
        ):
            with pytest.raises(ValueError, match=f'^{norm.name} expected input of shape {expected}, got ') as error:
                layer(torch.zeros(shape))
            assert f'got {shape};' in str(error.value)
        for dtype in (torch.int64, torch.bool, torch.complex64):
            with pytest.raises(ValueError, match=f'^{norm.name} expected a floating point input, got {dtype}'):
                layer(torch.zeros(2, 4, 5, 5, dtype=dtype))

    def test_tensors_of_another_length(self, norm, backend):
        """An error names what was replaced, and both shapes; the kernels would read beyond it. Nothing moves."""
        for name in ('weight', 'bias', *sorted(norm.extra), 'running_mean', 'running_var'):
            for training in (True, False):
                tensor = norm(4).state_dict()[name]
                others = [tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor[:0], tensor[None]]
                if name == 'neighbor_weight':
                    others += [tensor.view(4, -1), tensor.new_zeros(4 * 80)]  # the latter of a kernel of 9x9
                for other in others:
                    layer = randomize(norm(4)).train(training)
                    replace(layer, name, other)
                    before = copy.deepcopy(layer.state_dict())
                    expected = f'{norm.name}: {name} must have shape {tuple(tensor.shape)}, got {tuple(other.shape)};'
                    with pytest.raises(ValueError, match=f'^{re.escape(expected)}'):
                        layer(batch((2, 4, 6, 5)))
                    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())

    def test_tensors_that_are_missing(self, norm, backend):
        """None in the place of a parameter or statistic is an error that names it, not another function."""
        for name in ('weight', 'bias', *sorted(norm.extra), 'running_mean', 'running_var'):
            for training in (True, False):
                layer = norm(4).train(training)
                setattr(layer, name, None)
                with pytest.raises(ValueError, match=rf'^{norm.name}: {name} must have shape \((4|\d+),\), got None;'):
                    layer(batch((2, 4, 6, 5)))

    def test_tensors_of_the_same_length(self, norm, backend):
        """May be replaced: the layer then computes with the new ones."""
        for training in (True, False):
            layer, values = norm(3).train(training), randomize(norm(3)).state_dict()
            for name in ('weight', 'bias', *norm.extra, 'running_mean', 'running_var'):
                replace(layer, name, values[name])
            check_against_oracle(norm, layer, batch((4, 3, 6, 5), shared=3.0))

    def test_one_value_per_channel(self, norm):
        """It has no variance, in training alone."""
        for shape in ((1, 4, 1, 1), *((1, 4) for s in norm.shapes if s == (5, 3))):
            layer = norm(4)
            before = copy.deepcopy(layer.state_dict())
            with pytest.raises(ValueError, match=f'^{norm.name} needs more than 1 value per channel') as error:
                layer(torch.zeros(shape))
            assert f'got input of shape {shape};' in str(error.value)
            assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
            assert layer.eval()(torch.zeros(shape)).shape == shape


def replace(layer, name, value):
    """Another tensor in the place of a parameter or a buffer of the layer."""
    setattr(layer, name, nn.Parameter(value.clone()) if name in layer._parameters else value.clone())


@pytest.mark.parametrize('norm', TYPES.values(), ids=TYPES)
def test_compiles_to_one_graph(norm):
    """Of training and of evaluation each."""
    torch._dynamo.reset()
    eager = randomize(norm(3))
    layer = copy.deepcopy(eager)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for training in (True, True, False):
        inputs, outputs = [batch().requires_grad_() for _ in range(2)], []
        for run, module, x in zip((compiled, eager), (layer, eager), inputs, strict=True):
            module.train(training).zero_grad()
            outputs.append(run(x))
            (outputs[-1] * batch(seed=3)).sum().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
        for name, parameter in eager.named_parameters():
            torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert counter.frame_count == 2, 'one for training, one for evaluation'
