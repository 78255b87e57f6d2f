"""BNET's recipe through the tools: from a released ImageNet file, and evaluated from a released detector's file."""

import pytest
import torch
from cli import ROOT, checkpoint_of, data_options, metrics, tool
from released_bnet import detector_file, imagenet_file, resnet

from mmubn.checkpoints import convert_state_dict

CONFIG = ROOT / 'configs/faster_rcnn/faster-rcnn_r50_fpn_bnet3-k5-backbone_1x_coco.py'
# The recipe at small width, on ten classes.
SMALL = """
_base_ = '{base}'
init_cfg = dict(checkpoint='{checkpoint}', prefix=None)
model = dict(
    backbone=dict(module=dict(base_channels=8, stem_channels=8, init_cfg=init_cfg)),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(bbox_head=dict(num_classes=10)),
)
dataset = dict(metainfo=dict(classes=tuple('0123456789')))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
train_cfg = dict(max_epochs=1, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=0.001))
"""


@pytest.mark.slow
def test_from_their_files(digits, tmp_path):
    torch.save(imagenet_file(resnet().state_dict()), tmp_path / 'R50_BNET-5.pth')
    config = tmp_path / 'small.py'
    config.write_text(SMALL.format(base=CONFIG, checkpoint=tmp_path / 'R50_BNET-5.pth'))
    scales = ('train', 2), ('val', 1), ('test', 1)
    options = [
        *data_options(digits),
        *(f'{split}_dataloader.dataset.pipeline.{step}.scale=(128,128)' for split, step in scales),
    ]
    result = tool('train.py', config, '--work-dir', tmp_path / 'run', '--cfg-options', *options)
    assert result.returncode == 0, result.stdout
    assert 'mmubn: 16 BNET layers read: 16 from released BNET' in result.stdout

    content = checkpoint_of(tmp_path / 'run/epoch_1.pth')
    trained = content['state_dict']
    start = resnet().state_dict()['layer1.0.bnet3.bnconv.weight'][:, 0, 2, 2]
    assert torch.equal(trained['backbone.layer1.0.bn3.weight'], start), 'the first stage is frozen'
    moved = trained['backbone.layer4.2.bn3.neighbor_weight'].view(256, -1)[:, :12]
    assert not torch.equal(moved, resnet().state_dict()['layer4.2.bnet3.bnconv.weight'].flatten(1)[:, :12])

    theirs = tmp_path / 'theirs.pth'
    released, *_ = convert_state_dict(trained, 'bnet-released')
    assert 'backbone.layer1.0.bnet3.bnconv.weight' in released
    torch.save(detector_file(released), theirs)
    found = {}
    for name, path in (('ours', tmp_path / 'run/epoch_1.pth'), ('theirs', theirs)):
        result = tool('test.py', config, path, '--work-dir', tmp_path / name, '--cfg-options', *options)
        assert result.returncode == 0, result.stdout
        found[name] = metrics(tmp_path / name)
    for each in found.values():
        each.pop('data_time', None)
        each.pop('time', None)
    assert found['ours'] == found['theirs']
