_base_ = ['../_base_/models/vgg13_cifar.py', '../_base_/cifar10_bs128_200e.py']
model = dict(backbone=dict(depth=11, norm_cfg=dict(type='BN')), head=dict(num_classes=10))
