# Where the ImageNet-trained backbones are: a folder or the beginning of a URL. Expected in it, written by MMPretrain:
# resnet50-ubn_in1k.pth, resnet50-bn_in1k.pth, resnet101-ubn_in1k.pth, resnet101-bn_in1k.pth (README.md, "ImageNet
# checkpoints", says how to train them).
imagenet_checkpoints = 'checkpoints'

custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)
