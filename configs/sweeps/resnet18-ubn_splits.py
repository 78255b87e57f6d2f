_base_ = '../digits/resnet18-ubn_digits.py'
# The second has norms of the sweeps, the third MultiDatasetsEvaluator.
custom_imports = dict(imports=['mmubn', 'mmubn.analysis.sweep_norms', 'mmdet.evaluation'], allow_failed_imports=False)

# Three parts of the digits: a network learns from train, a learning rate is chosen by val, and test is reported.
data_root = 'data/digits-36-split0/'
train_dataloader = dict(num_workers=0, dataset=dict(data_root=data_root))
part = dict(
    type='CustomDataset',
    data_root=data_root,
    with_label=True,
    metainfo={{_base_.metainfo}},
    pipeline={{_base_.test_pipeline}},
)
val_dataloader = dict(
    num_workers=0,
    dataset=dict(
        _delete_=True,
        type='mmdet.ConcatDataset',
        datasets=[dict(data_prefix='val', **part), dict(data_prefix='test', **part)],
    ),
)
val_evaluator = dict(
    _delete_=True,
    type='mmdet.MultiDatasetsEvaluator',
    metrics=[dict(type='Accuracy', topk=1), dict(type='Accuracy', topk=1)],
    dataset_prefixes=['val', 'test'],
)
test_dataloader = val_dataloader
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
