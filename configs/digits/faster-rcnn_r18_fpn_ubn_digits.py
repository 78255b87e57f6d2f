_base_ = './mask-rcnn_r18_fpn_ubn_digits.py'
custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.pretrained'], allow_failed_imports=False)

model = dict(
    type='FasterRCNN',
    # What resnet18-ubn_digits.py learned; its stem and first stage stay as they are, as in the configs for COCO.
    backbone=dict(
        frozen_stages=1,
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='work_dirs/resnet18-ubn_digits/epoch_10.pth',
            prefix='backbone.',
            strict=True,
        ),
    ),
    roi_head=dict(mask_roi_extractor=None, mask_head=None),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
