_base_ = './resnet18-ubn_splits.py'
# The sweep says which norms of the module are replaced, and by what.
model = dict(
    backbone=dict(
        _delete_=True, type='ConvertNorms', module=_base_.model.backbone, norm_cfg=dict(type='UBN'), where='*'
    )
)
