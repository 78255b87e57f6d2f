_base_ = './resnet152-bn_3xb128_cifar100.py'
model = dict(backbone=dict(norm_cfg=dict(type='UBN')))
