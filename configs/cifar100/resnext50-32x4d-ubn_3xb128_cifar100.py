_base_ = './resnext50-32x4d-bn_3xb128_cifar100.py'
model = dict(backbone=dict(norm_cfg=dict(type='UBN')))
