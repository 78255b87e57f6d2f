_base_ = ['../_base_/models/inception-v4_cifar.py', '../_base_/cifar100_bs128_200e.py']
model = dict(backbone=dict(norm_cfg=dict(type='BN')))
