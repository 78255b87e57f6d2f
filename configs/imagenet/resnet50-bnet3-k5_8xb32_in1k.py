_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)
# BNET as its authors use it: the third norm of each bottleneck, with a kernel that starts at zero as the last BatchNorm
# of a block does; BatchNorm elsewhere. Their recipe is MMPretrain's: 100 epochs, 256 images in all.
model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvertNorms',
        module=dict(_base_.model.backbone, norm_cfg=dict(type='BN')),
        norm_cfg=dict(type='BNET', kernel_size=5),
        where='*.bn3',
    )
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
