_base_ = ['mmpretrain::_base_/models/resnet50.py', '../_base_/imagenet_bs256_90e.py']
model = dict(backbone=dict(norm_cfg=dict(type='BN')))
auto_scale_lr = dict(base_batch_size=1024)
