_base_ = './resnext50-32x4d-bn_8xb256_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(type='UBN')))
