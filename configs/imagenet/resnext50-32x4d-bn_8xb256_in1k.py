_base_ = ['mmpretrain::_base_/models/resnext50_32x4d.py', '../_base_/imagenet_bs256_90e.py']
model = dict(backbone=dict(norm_cfg=dict(type='BN')))
