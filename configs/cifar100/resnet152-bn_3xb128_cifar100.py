_base_ = ['mmpretrain::_base_/models/resnet152_cifar.py', '../_base_/cifar100_bs128_200e.py']
model = dict(backbone=dict(norm_cfg=dict(type='BN')), head=dict(num_classes=100))
