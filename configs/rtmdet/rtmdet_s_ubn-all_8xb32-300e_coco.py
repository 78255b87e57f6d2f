_base_ = './rtmdet_s_ubn-backbone_8xb32-300e_coco.py'
model = dict(neck=dict(norm_cfg=dict(type='UBN')), bbox_head=dict(norm_cfg=dict(type='UBN')))
