_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)

# The set that tools/dataset_converters/digits_to_imagefolder.py writes.
data_root = 'data/digits-classes/'
metainfo = dict(classes=tuple('0123456789'))
max_epochs = 10
randomness = dict(seed=0)

# The backbone of faster-rcnn_r18_fpn_ubn_digits.py, which starts from what this one learns.
data_preprocessor = dict(num_classes=10, mean=[127.5] * 3, std=[64.0] * 3)
model = dict(
    backbone=dict(stem_channels=32, base_channels=32, norm_cfg=dict(type='UBN')),
    head=dict(num_classes=10, in_channels=256, topk=(1,)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4, padding_mode='edge'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=1e-2))
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-5, by_epoch=True, convert_to_iter_based=True
)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=2))
auto_scale_lr = dict(base_batch_size=32)
