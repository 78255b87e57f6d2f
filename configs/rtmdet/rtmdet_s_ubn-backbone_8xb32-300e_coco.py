_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'
custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.pretrained'], allow_failed_imports=False)
model = dict(
    # True would turn every BatchNorm into SyncBatchNorm. Neck and head are that already, and a UBN must not be.
    use_syncbn=False,
    # MMDetection's ImageNet checkpoint, which UBN reads to the function of its BatchNorm.
    backbone=dict(norm_cfg=dict(type='UBN'), init_cfg=dict(strict=True)),
)
