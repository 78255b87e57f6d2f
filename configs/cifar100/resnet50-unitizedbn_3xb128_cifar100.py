_base_ = './resnet50-bn_3xb128_cifar100.py'
model = dict(backbone=dict(norm_cfg=dict(type='UnitizedBN')))
