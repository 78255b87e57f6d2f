_base_ = './resnet50-bn_4xb256_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(type='UBN')))
