_base_ = ['mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', '../_base_/imagenet_backbone.py']
# MMDetection's config is for a Caffe checkpoint: another place of the stride, BGR, norms whose weights do not learn.
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        style='pytorch',
        norm_cfg=dict(type='UBN', requires_grad=True),
        init_cfg=dict(
            prefix='backbone.', strict=True, checkpoint=f'{_base_.imagenet_checkpoints}/resnet50-ubn_in1k.pth'
        ),
    ),
)
