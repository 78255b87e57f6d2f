"""``--amp`` without a GPU: bfloat16 through mmcv's operators, which know float32 alone."""

import pytest
import torch
from mmcv.ops import RoIAlign, batched_nms, nms, soft_nms
from mmengine.config import Config

from mmubn.openmmlab import patches
from mmubn.openmmlab.mixed_precision import CPUAmpOptimWrapper, use_mixed_precision


@pytest.fixture(scope='module', autouse=True)
def _widened():
    for _ in range(2):  # twice is once
        CPUAmpOptimWrapper(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    assert 'bfloat16-operators' in patches._applied


def boxes_and_scores():
    generator = torch.Generator().manual_seed(0)
    corners = 20 * torch.rand(30, 2, generator=generator)
    boxes = torch.cat([corners, corners + 10], dim=1).bfloat16()
    return boxes, torch.rand(30, generator=generator).bfloat16()


@pytest.mark.parametrize('call', [nms, soft_nms])
def test_nms_in_bfloat16_keeps_the_boxes_that_float32_keeps(call):
    boxes, scores = boxes_and_scores()
    _, keep = call(boxes, scores, 0.5)
    _, expected = call(boxes.float(), scores.float(), 0.5)
    assert 0 < len(expected) < 30
    assert torch.equal(keep, expected)


def test_batched_nms_in_bfloat16():
    boxes, scores = boxes_and_scores()
    classes = torch.arange(30) % 3
    settings = dict(type='nms', iou_threshold=0.5)
    _, keep = batched_nms(boxes, scores, classes, settings)
    _, expected = batched_nms(boxes.float(), scores.float(), classes, settings)
    assert torch.equal(keep, expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
def test_roi_align_gives_back_the_dtype_that_came_in(dtype):
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    rois = torch.tensor([[0.0, 1.0, 1.0, 10.0, 12.0]])
    y = RoIAlign(7, sampling_ratio=2)(x, rois.to(dtype))
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    wide = x.detach().float().requires_grad_()
    expected = RoIAlign(7, sampling_ratio=2)(wide, rois)
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y.float(), expected, **tolerance)
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad.float(), wide.grad, **({'rtol': 2e-2, 'atol': 2e-2} if tolerance else {}))


@pytest.mark.parametrize(('device', 'expected'), [('cpu', 'CPUAmpOptimWrapper'), ('cuda', 'AmpOptimWrapper')])
def test_amp_chooses_the_wrapper_of_the_device(monkeypatch, device, expected):
    monkeypatch.setattr('mmubn.openmmlab.mixed_precision.get_device', lambda: device)
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))))
    use_mixed_precision(cfg)
    assert cfg.optim_wrapper.type == expected
    assert cfg.optim_wrapper.get('loss_scale') == ('dynamic' if device == 'cuda' else None)
