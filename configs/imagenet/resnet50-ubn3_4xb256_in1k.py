_base_ = './resnet50-bn_4xb256_in1k.py'
# UBN in the place that BNET's authors chose: the third norm of each bottleneck; BatchNorm elsewhere.
model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvertNorms',
        module=_base_.model.backbone,
        norm_cfg=dict(type='UBN'),
        where='*.bn3',
    )
)
