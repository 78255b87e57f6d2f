_base_ = './resnet50-bnet3-k5_8xb32_in1k.py'
model = dict(backbone=dict(module=dict(depth=101)))
