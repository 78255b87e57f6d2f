# VGG-13 on 32x32 pixels, which its five poolings bring to 1x1: the three linear layers read 512 values, not 7x7x512.
_base_ = 'mmpretrain::_base_/models/vgg13bn.py'

model = dict(
    backbone=dict(num_classes=-1),  # no linear layers
    neck=dict(_delete_=True, type='GlobalAveragePooling'),
    head=dict(
        type='StackedLinearClsHead', num_classes=100, in_channels=512, mid_channels=[4096, 4096], dropout_rate=0.5
    ),
)
