"""tools/analysis_tools/count_launches.py: its tables are those of mmubn.analysis.launches."""

import torch
from cli import call
from torch import nn

from mmubn.analysis import benchmark
from mmubn.analysis.launches import Launches, launches_of_a_step
from mmubn.layers import UBN

TOOL = 'analysis_tools/count_launches.py'


def test_what_is_a_launch():
    x, weight = torch.empty(2, 3, 4, 4, device='meta'), torch.empty(5, 3, 3, 3, device='meta', requires_grad=True)
    with Launches() as found:
        y = nn.functional.conv2d(x.view(2, 3, 4, 4)[:1], weight, torch.empty(5, device='meta'))
        (y.expand(2, 5, 2, 2) * 2)[1:].sum().backward()
    assert found.by_operator == {
        'convolution': 2,  # and the bias
        'mul': 2,
        'sum': 2,  # and that of the expanded dimension
        'ones_like': 1,
        'slice_backward': 2,
        'convolution_backward': 1,  # x needs no gradient
    }


def test_what_is_moved():
    x = torch.empty(2, 3, 4, 4, device='meta')
    with Launches() as found:
        torch.add(x, x[:, :, :1, :1].expand_as(x), out=torch.empty_like(x))
    assert found.total == 1
    assert found.bytes_moved == 4 * (96 + 6 + 96)


def test_convolutions_keep_channels_last():
    layer = nn.Conv2d(3, 4, 3).to('meta', memory_format=torch.channels_last)
    x = torch.empty(2, 3, 8, 8, device='meta', requires_grad=True)
    with Launches():
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_tables(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'resnet50', lambda norm: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4)))
    assert call(monkeypatch, TOOL, '--shape', '2,3,32,32') == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in out.splitlines() if line.startswith('|')]
    forward, backward = launches_of_a_step(UBN(64), (32, 64, 56, 56))
    layer = forward.total + backward.total
    assert rows[2][2] == str(layer + 3), 'a convolution with its two gradients, and the layer'
    assert next(row for row in rows if row[:2] == ['UBN', 'nchw'])[3].split()[0] == str(layer)
