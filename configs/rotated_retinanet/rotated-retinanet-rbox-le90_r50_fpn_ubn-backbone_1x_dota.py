_base_ = 'mmrotate::rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py'
# Starts from torchvision's checkpoint, of BatchNorm, to the same function.
model = dict(backbone=dict(norm_cfg=dict(type='UBN', requires_grad=True)))
