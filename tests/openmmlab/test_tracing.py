"""Each norm is one node of a graph of torch.fx, as those of torch.nn are, without a change in torch."""

import pytest
import torch
from networks import TYPES, Net, trained
from torch import nn
from torchvision.models import feature_extraction


class TestTracing:
    def test_torch_is_as_it_was(self):
        """``import mmubn`` wraps nothing here: the layers themselves see to it."""
        assert torch.fx.Tracer.is_leaf_module.__module__ == 'torch.fx._symbolic_trace'
        assert not hasattr(torch.fx.Tracer.is_leaf_module, '__wrapped__')

    @pytest.mark.parametrize('norm', TYPES)
    def test_each_type_is_one_node_and_follows_the_mode(self, norm):
        model, x = trained(Net(norm)), torch.randn(2, 3, 6, 6)
        graph = torch.fx.symbolic_trace(model)
        assert ['call_module', 'bn'] in [[node.op, node.target] for node in graph.graph.nodes]
        torch.testing.assert_close(graph(x), model(x))
        graph.train()(x)
        assert graph.bn.num_batches_tracked == 2

    def test_others_are_as_before(self):
        graph = torch.fx.symbolic_trace(Net(nn.BatchNorm2d)).graph
        assert [node.target for node in graph.nodes] == ['x', 'conv', 'bn', 'block.0', 'block.1', 'block.2', 'output']

    @pytest.mark.parametrize('norm', TYPES)
    def test_a_norm_alone_is_an_error(self, norm):
        """There is no node that it could be, and a trace through it would freeze its mode."""
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(norm(3).eval())

    @pytest.mark.parametrize('norm', TYPES)
    def test_feature_extraction_of_torchvision(self, norm):
        """By the name of the norm, as of any leaf, in each mode."""
        model, x = trained(Net(norm)), torch.randn(2, 3, 6, 6)
        training, evaluation = feature_extraction.get_graph_node_names(model)
        assert evaluation == training == ['x', 'conv', 'bn', 'block.0', 'block.1', 'block.2']
        extractor = feature_extraction.create_feature_extractor(model, ['bn', 'block.0'])
        features = extractor(x)
        torch.testing.assert_close(features['bn'], model.bn(model.conv(x)))
        torch.testing.assert_close(features['block.0'], model.block[0](features['bn']))
