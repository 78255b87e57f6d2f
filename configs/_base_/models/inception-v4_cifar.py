model = dict(
    type='ImageClassifier',
    backbone=dict(type='InceptionV4_CIFAR', norm_cfg=dict(type='BN')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=100, in_channels=1536, loss=dict(type='CrossEntropyLoss', loss_weight=1.0)
    ),
)
