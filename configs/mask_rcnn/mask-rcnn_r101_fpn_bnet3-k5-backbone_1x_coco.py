_base_ = './mask-rcnn_r50_fpn_bnet3-k5-backbone_1x_coco.py'
model = dict(
    backbone=dict(
        module=dict(
            depth=101,
            init_cfg=dict(checkpoint=f'{_base_.imagenet_checkpoints}/resnet101-bnet3-k5_in1k.pth'),
        )
    )
)
