_base_ = './faster-rcnn_r101_fpn_ubn-backbone-gated_1x_coco.py'
# Statistics and gate over the images of all GPUs; the checkpoint is UBN's.
model = dict(backbone=dict(norm_cfg=dict(type='SyncUBN')))
