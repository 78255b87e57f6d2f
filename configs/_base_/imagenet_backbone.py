# Where the ImageNet-trained backbones are: a folder or the beginning of a URL. Expected in it, written by MMPretrain:
# resnet50-ubn_in1k.pth, resnet50-bn_in1k.pth, resnet101-ubn_in1k.pth, resnet101-bn_in1k.pth (README.md, "ImageNet
# checkpoints", says how to train them), and for the configs with bnet3 or ubn3 in their names those of the same names
# (docs/reproduce.md). A checkpoint that lacks a key of the backbone, or has one too many under the prefix, is an error
# (strict=True in the configs).
imagenet_checkpoints = 'checkpoints'

custom_imports = dict(imports=['mmubn', 'mmubn.openmmlab.pretrained'], allow_failed_imports=False)
