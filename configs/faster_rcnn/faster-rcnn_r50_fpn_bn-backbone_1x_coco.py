_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/imagenet_backbone.py']
model = dict(
    backbone=dict(
        norm_cfg=dict(type='BN'),
        init_cfg=dict(
            prefix='backbone.', strict=True, checkpoint=f'{_base_.imagenet_checkpoints}/resnet50-bn_in1k.pth'
        ),
    )
)
