_base_ = './resnet101-bn_8xb256_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(type='UBN')))
