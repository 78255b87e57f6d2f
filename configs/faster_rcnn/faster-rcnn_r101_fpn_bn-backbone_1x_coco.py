_base_ = './faster-rcnn_r50_fpn_bn-backbone_1x_coco.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint=f'{_base_.imagenet_checkpoints}/resnet101-bn_in1k.pth'),
    )
)
