"""docs/deployment.md, "A whole detector" and "OpenVINO": the programs of the page, and what they give."""

import importlib.util
import re
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from helpers import randomize
from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmubn import UBN, fold

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs' / 'deployment.md'
CONFIG = ROOT / 'configs' / 'digits' / 'faster-rcnn_r18_fpn_ubn_digits.py'
SIZE = (96, 128)


def block(heading):
    """The first block of Python below a heading."""
    return re.search(rf'^## {heading}\n.*?```python\n(.*?)```', DOCS.read_text(), re.DOTALL | re.MULTILINE)[1]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The page's export_detector.py, imported."""
    path = tmp_path / 'export_detector.py'
    path.write_text(block('A whole detector'))
    spec = importlib.util.spec_from_file_location('export_detector', path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'export_detector', module)
    spec.loader.exec_module(module)
    return module


def build(**bbox_head):
    """The config, and its detector with random weights that tell boxes, classes and images apart."""
    torch.manual_seed(0)
    init_default_scope('mmdet')
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.init_cfg = None
    cfg.model.roi_head.bbox_head.update(bbox_head)
    cfg.model.data_preprocessor.bgr_to_rgb = True
    cfg.model.test_cfg.rcnn.max_per_img = 100
    detector = MODELS.build(cfg.model).eval()
    randomize(detector.backbone, 0.02)
    with torch.no_grad():
        detector.rpn_head.rpn_cls.weight.mul_(3)
        detector.roi_head.bbox_head.fc_cls.weight.mul_(5)
    return cfg, detector


def images(size=SIZE):
    return [torch.randint(0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(i)).float() for i in range(3)]


@torch.no_grad()
def of_mmdetection(detector, image):
    """What MMDetection predicts for an image of its inference pipeline."""
    size = tuple(image.shape[2:])
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
    found = detector.test_step(dict(inputs=[image[0]], data_samples=[sample]))[0].pred_instances
    return found.bboxes, found.scores, found.labels


def above(threshold, outputs):
    boxes, scores, labels = map(torch.as_tensor, outputs)
    return tuple(each[scores > threshold] for each in (boxes, scores, labels))


@pytest.mark.parametrize(
    ('agnostic', 'size'),
    [(False, SIZE), (True, SIZE), (False, (90, 101))],
    ids=['a box for each class', 'one for all', 'a size that is padded'],
)
def test_the_program_is_mmdetection_s_prediction(program, agnostic, size):
    """Without folding and exporting."""
    _, detector = build(reg_class_agnostic=agnostic)
    for image in images(size):
        expected = of_mmdetection(detector, image)
        assert len(expected[0]) > 5
        assert len(set(expected[2].tolist())) > 1
        with torch.no_grad():
            found = above(detector.test_cfg.rcnn.score_thr, program.Detections(detector)(image))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_another_detector_is_an_error(program):
    init_default_scope('mmdet')
    with pytest.raises(TypeError, match='expected a Faster or Mask R-CNN, got a ResNet'):
        program.Detections(ResNet(18))


@pytest.mark.slow
def test_the_exported_detector_finds_the_same_boxes(program, tmp_path):
    cfg, detector = build()
    config, checkpoint, path = tmp_path / 'config.py', tmp_path / 'detector.pth', tmp_path / 'detector.onnx'
    cfg.dump(config)
    torch.save(dict(state_dict=detector.state_dict(), meta={}), checkpoint)
    program.export_detector(str(config), str(checkpoint), str(path), *SIZE)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for image in images():
        expected = of_mmdetection(detector, image)
        assert len(expected[0]) > 5
        boxes, scores, labels = above(cfg.model.test_cfg.rcnn.score_thr, session.run(None, {'image': image.numpy()}))
        torch.testing.assert_close(boxes, expected[0], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores, expected[1], rtol=0, atol=1e-3)
        assert labels.tolist() == expected[2].tolist()


@pytest.mark.parametrize('folded', [True, pytest.param(False, marks=pytest.mark.slow)], ids=['folded', 'unfolded'])
def test_openvino_reads_the_backbone(folded, tmp_path, monkeypatch):
    """The program of the page, with the first stage of a ResNet-18 for a backbone."""
    pytest.importorskip('openvino')
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = ResNet(18, norm_cfg=dict(type='UBN'), num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    randomize(net, 0.1)
    net.eval()
    assert sum(isinstance(layer, UBN) for layer in net.modules()) == 5
    sizes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    model = fold(net) if folded else net
    example = torch.randn(2, 3, 64, 64)
    torch.onnx.export(
        model, (example,), 'backbone.onnx', input_names=['image'], dynamic_shapes=sizes, dynamo=True, verbose=False
    )
    names = {}
    exec(compile(block('OpenVINO'), str(DOCS), 'exec'), names)
    assert names['features'][0].shape == (1, 64, 24, 16)
    for image in (example, torch.randn(1, 3, 96, 64)):
        with torch.no_grad():
            (expected,) = net(image)
        (found,) = names['compiled'](image.numpy()).values()
        assert float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max()) < 1e-5
