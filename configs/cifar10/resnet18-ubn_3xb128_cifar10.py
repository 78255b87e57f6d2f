_base_ = './resnet18-bn_3xb128_cifar10.py'
model = dict(backbone=dict(norm_cfg=dict(type='UBN')))
