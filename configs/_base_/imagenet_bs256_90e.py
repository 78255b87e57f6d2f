# The paper's recipe for ImageNet (section 4.1.1), with 256 images per GPU, on 8 GPUs (ResNet-50: 4): 90 epochs, SGD
# with learning rate 0.1, divided by 10 after 30 and 60 epochs; weight decay 1e-4. Crops, flips and data layout are
# MMPretrain's.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64.py',
    'mmpretrain::_base_/schedules/imagenet_bs256.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)

train_dataloader = dict(batch_size=256, num_workers=12)
val_dataloader = dict(batch_size=256, num_workers=12)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=90)
param_scheduler = dict(milestones=[30, 60])
auto_scale_lr = dict(base_batch_size=2048)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
