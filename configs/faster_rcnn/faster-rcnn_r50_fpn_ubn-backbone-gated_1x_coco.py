_base_ = './faster-rcnn_r50_fpn_ubn-backbone_1x_coco.py'
# norm_eval=False: statistics and the gate act during detection training too.
model = dict(backbone=dict(norm_eval=False))
