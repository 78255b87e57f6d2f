# The paper's recipe for CIFAR-10 (section 4.1.3), on 3 GPUs with 128 images each: 200 epochs, SGD with learning rate
# 0.1, divided by 10 after 100 and 150 epochs; weight decay 1e-4. Crops, flips and data layout are MMPretrain's, and so
# is the schedule.
_base_ = [
    'mmpretrain::_base_/datasets/cifar10_bs16.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.models'], allow_failed_imports=False)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, 5))
test_evaluator = val_evaluator

auto_scale_lr = dict(base_batch_size=384)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
