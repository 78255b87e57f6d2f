_base_ = ['mmpretrain::_base_/models/resnet50_cifar.py', '../_base_/cifar10_bs128_200e.py']
model = dict(backbone=dict(norm_cfg=dict(type='BN')))
