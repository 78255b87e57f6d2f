_base_ = './resnet50-bnet3-k5_8xb32_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(kernel_size=7)))
