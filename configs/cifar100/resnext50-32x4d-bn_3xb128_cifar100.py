_base_ = ['mmpretrain::_base_/models/resnext50_32x4d.py', '../_base_/cifar100_bs128_200e.py']
model = dict(backbone=dict(type='ResNeXt_CIFAR', norm_cfg=dict(type='BN')), head=dict(num_classes=100))
