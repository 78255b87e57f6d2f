# The paper's recipe for CIFAR-100 (section 4.1.2), on 3 GPUs with 128 images each: 200 epochs, SGD with learning rate
# 0.1, warmed up linearly by iteration in the first epoch, and multiplied by 0.2 after 60, 120 and 160 epochs; weight
# decay 5e-4. Crops, flips and data layout are MMPretrain's.
_base_ = [
    'mmpretrain::_base_/datasets/cifar100_bs16.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.models'], allow_failed_imports=False)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, 5))
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(weight_decay=5e-4))
param_scheduler = [
    # The paper does not say where the warm-up starts.
    dict(type='LinearLR', start_factor=0.01, begin=0, end=1, by_epoch=True, convert_to_iter_based=True),
    dict(type='MultiStepLR', milestones=[60, 120, 160], gamma=0.2, by_epoch=True),
]
auto_scale_lr = dict(base_batch_size=384)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
