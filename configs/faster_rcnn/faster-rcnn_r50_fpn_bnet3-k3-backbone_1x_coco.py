_base_ = './faster-rcnn_r50_fpn_bnet3-k5-backbone_1x_coco.py'
model = dict(
    backbone=dict(
        norm_cfg=dict(kernel_size=3),
        module=dict(init_cfg=dict(checkpoint=f'{_base_.imagenet_checkpoints}/resnet50-bnet3-k3_in1k.pth')),
    )
)
