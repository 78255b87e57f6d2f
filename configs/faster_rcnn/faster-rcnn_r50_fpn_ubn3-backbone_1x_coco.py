_base_ = './faster-rcnn_r50_fpn_bn-backbone_1x_coco.py'
# UBN in the place that BNET's authors chose: the third norm of each bottleneck; BatchNorm elsewhere.
model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvertNorms',
        module=dict(
            _base_.model.backbone,
            init_cfg=dict(
                _base_.model.backbone.init_cfg, checkpoint=f'{_base_.imagenet_checkpoints}/resnet50-ubn3_in1k.pth'
            ),
        ),
        norm_cfg=dict(type='UBN'),
        where='*.bn3',
    )
)
