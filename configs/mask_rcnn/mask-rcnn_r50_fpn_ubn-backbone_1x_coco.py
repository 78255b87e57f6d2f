_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/imagenet_backbone.py']
model = dict(
    backbone=dict(
        norm_cfg=dict(type='UBN'),
        init_cfg=dict(
            prefix='backbone.', strict=True, checkpoint=f'{_base_.imagenet_checkpoints}/resnet50-ubn_in1k.pth'
        ),
    )
)
