"""Each norm is one node of a graph of torch.fx, as those of torch.nn are, without a change in torch."""

import copy

import pytest
import torch
from helpers import batch, randomize
from networks import TYPES, Net, trained
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

NODES = ['x', 'conv', 'bn', 'block.0', 'block.1', 'block.2']


def images(seed=0):
    return batch((2, 3, 6, 6), seed)


def test_torch_is_as_it_was():
    """``import mmubn`` wraps nothing here: the layers themselves see to it."""
    assert torch.fx.Tracer.is_leaf_module.__module__ == 'torch.fx._symbolic_trace'
    assert not hasattr(torch.fx.Tracer.is_leaf_module, '__wrapped__')
    graph = torch.fx.symbolic_trace(Net(nn.BatchNorm2d)).graph
    assert [node.target for node in graph.nodes] == [*NODES, 'output']


@pytest.mark.parametrize('norm', TYPES)
class TestTracing:
    def test_it_is_one_node_that_follows_the_mode(self, norm):
        model = trained(Net(norm))
        randomize(model.bn)
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes] == [*NODES, 'output']
        assert [node.op for node in traced.graph.nodes if node.target == 'bn'] == ['call_module']
        expected = copy.deepcopy(model)
        for training in (False, True):
            assert torch.equal(traced.train(training)(images()), expected.train(training)(images()))
        torch.testing.assert_close(traced.bn.state_dict(), expected.bn.state_dict(), rtol=0, atol=0)
        assert traced.bn.num_batches_tracked == 2

    def test_feature_extraction_of_torchvision(self, norm):
        """By the name of the norm, as of any leaf, in each mode."""
        model = trained(Net(norm))
        assert get_graph_node_names(model) == (NODES, NODES)  # in training, in evaluation
        for training in (False, True):
            model.train(training)
            extractor, expected = create_feature_extractor(model, ['bn', 'block.0']), copy.deepcopy(model)
            features = extractor(images(seed=1))
            y = expected.bn(expected.conv(images(seed=1)))
            assert torch.equal(features['bn'], y)
            assert torch.equal(features['block.0'], expected.block[0](y))

    def test_leaf_of_a_tracer_that_knows_it(self, norm):
        class Tracer(torch.fx.Tracer):
            def is_leaf_module(self, module, name):
                return isinstance(module, norm)

        model = nn.Sequential(nn.ReLU(), randomize(norm(3)))
        traced = torch.fx.GraphModule(model, Tracer().trace(model))
        assert [node.op for node in traced.graph.nodes if node.target == '1'] == ['call_module']
        assert torch.equal(copy.deepcopy(traced)(images()), copy.deepcopy(model)(images()))
        assert torch.equal(traced.eval()(images()), model.eval()(images()))

    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_alone_it_cannot_be_traced(self, norm, training):
        """As a BatchNorm cannot: it is no node of its own graph, and looks at the shape of its input."""
        for layer in (norm(3), nn.BatchNorm2d(3)):
            with pytest.raises(torch.fx.proxy.TraceError):
                torch.fx.symbolic_trace(layer.train(training))


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('norm', TYPES)
def test_a_trace_by_jit_passes_its_own_check(norm):
    """It compares a trace with gradients and one without, which must have the same operators."""
    layer = randomize(norm(4)).eval()
    x = batch((2, 4, 6, 5))
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(batch((3, 4, 7, 5), seed=1)), layer(batch((3, 4, 7, 5), seed=1)))
