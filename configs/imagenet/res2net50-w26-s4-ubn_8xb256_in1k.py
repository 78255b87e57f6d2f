_base_ = './res2net50-w26-s4-bn_8xb256_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(type='UBN')))
