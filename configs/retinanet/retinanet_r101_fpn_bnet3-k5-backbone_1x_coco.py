_base_ = './retinanet_r50_fpn_ubn-backbone_1x_coco.py'
# BNET as its authors use it: the third norm of each bottleneck, those of the frozen stage too; BatchNorm elsewhere.
model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvertNorms',
        module=dict(
            _base_.model.backbone,
            depth=101,
            norm_cfg=dict(_base_.model.backbone.norm_cfg, type='BN'),
            init_cfg=dict(
                _base_.model.backbone.init_cfg,
                checkpoint=f'{_base_.imagenet_checkpoints}/resnet101-bnet3-k5_in1k.pth',
            ),
        ),
        norm_cfg=dict(type='BNET', kernel_size=5),
        where='*.bn3',
    )
)
