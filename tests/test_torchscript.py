"""TorchScript: traces of models with the norms and what becomes of them, TensorBoard's graph, scripts."""

import copy

import pytest
import torch
from helpers import batch, randomize
from networks import TYPES, Net, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from mmubn import UBN, UnitizedBN, fold

SIZES = [(1, 3, 5, 5), (5, 3, 12, 7)]
pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
each_type = pytest.mark.parametrize('norm', TYPES)
each_mode = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])


def network(norm):
    model = trained(Net(norm))
    randomize(model)
    return model


def images(shape=(2, 3, 8, 8), seed=0, shared=0.0):
    return batch(shape, seed, shared)


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def check(found, model):
    """At other batch and map sizes than those of the trace; torch optimizes a script in its first runs."""
    for shape in SIZES * 2:
        x = images(shape, seed=1)
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)


def saved_and_loaded(script, path):
    torch.jit.save(script, path)
    return torch.jit.load(path)


@each_type
class TestTensorBoard:
    @each_mode
    def test_a_graph_is_added_and_the_model_stays_as_it_is(self, norm, training, tmp_path):
        model = network(norm).train(training)
        before = buffers(model)
        with SummaryWriter(tmp_path) as writer:
            writer.add_graph(model, images())
        assert all(module.training == training for module in model.modules())
        torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)

        events = EventAccumulator(str(tmp_path))
        events.Reload()
        names = [node.name for node in events.Graph().node]
        for name, _ in model.bn.named_parameters():
            assert any(node.startswith(f'Net/{norm.__name__}[bn]/{name}/') for node in names), name

    @each_mode
    def test_a_trace_by_its_settings_moves_what_one_of_a_batch_norm_moves(self, norm, training):
        """In training it runs the model several times, to check itself; each counts as a batch."""
        moved = {}
        for kind in (nn.BatchNorm2d, norm):
            model = network(kind).train(training)
            before = buffers(model.bn)
            torch.jit.trace(model, (images(),), strict=False)
            moved[kind] = int(model.bn.num_batches_tracked - before['num_batches_tracked'])
            stayed = [torch.equal(buffer, before[name]) for name, buffer in model.bn.named_buffers()]
            assert not any(stayed) if training else all(stayed)
        assert moved[norm] == moved[nn.BatchNorm2d]


@each_type
class TestTrace:
    @pytest.mark.parametrize('prepare', [lambda model: model, fold], ids=['as trained', 'folded'])
    def test_evaluation(self, norm, prepare, tmp_path):
        model = network(norm)
        traced = torch.jit.trace(prepare(model), images())
        for script in (traced, torch.jit.freeze(traced)):
            check(script, model)
            check(saved_and_loaded(script, tmp_path / 'trace.pt'), model)

    @pytest.mark.parametrize('prepare', [lambda model: model, fold], ids=['as trained', 'folded'])
    def test_optimized_for_inference(self, norm, prepare, tmp_path):
        """Torch folds norms into convolutions there: a BatchNorm, and none of ours. No file takes what comes out."""
        model = network(norm)
        traced = saved_and_loaded(torch.jit.trace(prepare(model), images()), tmp_path / 'trace.pt')
        assert 'batch_norm' in str(traced.inlined_graph), 'of the BatchNorm'
        optimized = torch.jit.optimize_for_inference(traced)
        assert 'batch_norm' not in str(optimized.inlined_graph)
        check(optimized, model)

    def test_a_part_of_a_script(self, norm):
        class Whole(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                return self.model(x) if x.shape[0] > 0 else x

        model = network(norm)
        check(torch.jit.script(Whole(torch.jit.trace(model, images()))), model)

    def test_training(self, norm):
        """A trace of training trains on, and its gate follows the batches."""
        layer = randomize(norm(3))
        traced = torch.jit.trace(copy.deepcopy(layer), images(), check_trace=False)
        layer.load_state_dict(traced.state_dict())
        counts = []
        for seed, similarity in enumerate((0.9, -0.9, -0.9, 0.9)):
            for module in (layer, traced):
                if hasattr(layer, 'running_similarity'):
                    module.running_similarity.fill_(similarity)
            x = images(seed=seed)
            torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(buffers(traced), buffers(layer), rtol=1e-4, atol=1e-5)
            counts.append(int(traced.num_batches_tracked))
        assert counts == ([2, 2, 2, 3] if hasattr(layer, 'running_similarity') else [2, 3, 4, 5])


@each_type
class TestScript:
    def test_it_says_what_to_do(self, norm):
        advice = r'torch\.jit\.trace\(model\.eval\(\), x\)'
        if norm is not UnitizedBN:  # whose folded model may hold it still
            advice += r', or fold its norms first, torch\.jit\.script\(mmubn\.fold\(model\.eval\(\)\)\)'
        for model in (network(norm), norm(4)):
            with pytest.raises(RuntimeError, match=rf'^{norm.__name__} cannot be scripted: [^.]*{advice}\.$'):
                torch.jit.script(model)

    def test_folded(self, norm, tmp_path):
        model = network(norm)
        if norm is UnitizedBN:
            model.bn.scale_weight.data.zero_()  # what folds
        script = torch.jit.script(fold(model))
        check(script, model)
        check(saved_and_loaded(torch.jit.freeze(script), tmp_path / 'script.pt'), model)
        assert script.bn(torch.zeros(0, 4, 2, 2)).shape == (0, 4, 2, 2)


@pytest.mark.parametrize('options', [dict(calibrate_bias=True), dict(scaling=False), dict(centering=False)], ids=str)
def test_forms_of_a_folded_layer(options):
    layer = randomize(UBN(3, **options)).eval()
    check(torch.jit.script(fold(layer)), layer)
