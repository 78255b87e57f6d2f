_base_ = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
# In all norms, where MMSegmentation's config has SyncBN: 2 images on a GPU are few for statistics. The backbone starts
# from MMSegmentation's own checkpoint, of BatchNorm, to the same function.
norm_cfg = dict(type='SyncUBN', requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
