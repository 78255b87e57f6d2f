_base_ = './faster-rcnn_r50_fpn_bn-backbone_1x_coco.py'
# BNET as its authors use it: the third norm of each bottleneck, those of the frozen stage too; BatchNorm elsewhere.
model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvertNorms',
        module=dict(
            _base_.model.backbone,
            init_cfg=dict(
                _base_.model.backbone.init_cfg, checkpoint=f'{_base_.imagenet_checkpoints}/resnet50-bnet3-k5_in1k.pth'
            ),
        ),
        norm_cfg=dict(type='BNET', kernel_size=5),
        where='*.bn3',
    )
)
