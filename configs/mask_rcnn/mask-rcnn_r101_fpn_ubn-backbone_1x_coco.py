_base_ = './mask-rcnn_r50_fpn_ubn-backbone_1x_coco.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint=f'{_base_.imagenet_checkpoints}/resnet101-ubn_in1k.pth'),
    )
)
