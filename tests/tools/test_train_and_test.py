"""tools/train.py, tools/test.py and their distributed scripts, on CPU processes, as a user calls them."""

import json
import os
import pickle
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import toy
from cli import CONFIG, ROOT, checkpoint_of, data_options, free_port, metrics, ranks, run, tool
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from new_style import in_pure_python
from torchvision.models import resnet50

TOOLS = ROOT / 'tools'
TOY = str(Path(toy.__file__).parent)


def logged(work_dir):
    """All scalars that the runs in ``work_dir`` logged, in order."""
    lines = [line for path in sorted(work_dir.glob('*/vis_data/scalars.json')) for line in path.open()]
    return [json.loads(line) for line in lines]


def steps(work_dir):
    return [record['step'] for record in logged(work_dir) if 'loss' in record]


def coco(work_dir):
    """The COCO metrics of the last test run in ``work_dir``."""
    return {key: value for key, value in metrics(work_dir).items() if key.startswith('coco/')}


def running_similarities(checkpoint):
    state_dict = checkpoint_of(checkpoint)['state_dict']
    return {key: float(value) for key, value in state_dict.items() if key.endswith('running_similarity')}


class TestOneProcess:
    def test_trains_and_saves(self, trained):
        assert steps(trained) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert (trained / 'epoch_2.pth').is_file()
        similarities = running_similarities(trained / 'epoch_2.pth')
        assert len(similarities) == 20
        assert all(-1 <= value < 1 for value in similarities.values()), 'each layer must have seen two samples'

    def test_evaluates(self, trained, small, tmp_path):
        out = tmp_path / 'predictions.pkl'
        options = ['--work-dir', tmp_path, '--out', out, '--show-dir', 'drawn', '--cfg-options', *small]
        result = tool('test.py', CONFIG, trained / 'epoch_2.pth', *options)
        assert result.returncode == 0, result.stdout
        found = metrics(tmp_path)
        validated = next(record for record in logged(trained) if 'coco/bbox_mAP' in record)
        for kind in ('bbox', 'segm'):
            assert found[f'coco/{kind}_mAP'] == validated[f'coco/{kind}_mAP']
        assert len(pickle.loads(out.read_bytes())) == 4
        assert len(list(tmp_path.glob('*/drawn/*.png'))) == 4

    def test_test_time_augmentation(self, trained, small, tmp_path):
        boxes = [
            'model.roi_head.mask_head=None',
            'model.roi_head.mask_roi_extractor=None',
            'test_evaluator.metric=bbox',
        ]
        options = ['--tta', '--work-dir', tmp_path, '--allow-partial', '--cfg-options', *small]
        result = tool('test.py', CONFIG, trained / 'epoch_2.pth', *options)
        assert result.returncode == 2
        last = result.stdout.splitlines()[-1]
        assert last.startswith('error: --tta merges boxes, by DetTTAModel of MMDetection, and the model has masks')
        assert all(option in last for option in boxes), 'what to do'
        result = tool('test.py', CONFIG, trained / 'epoch_2.pth', *options, *boxes)
        assert result.returncode == 0, result.stdout
        assert 'keys of the model loaded; 8 keys are not in the model (roi_head.mask_head' in result.stdout
        assert 'coco/bbox_mAP' in metrics(tmp_path)

    def test_amp_and_auto_scale_lr(self, small, tmp_path):
        options = [
            '--amp',
            '--auto-scale-lr',
            '--work-dir',
            tmp_path,
            '--cfg-options',
            *small,
            'train_cfg.max_epochs=1',
        ]
        result = tool('train.py', CONFIG, *options, 'param_scheduler=[]', 'auto_scale_lr.base_batch_size=16')
        assert result.returncode == 0, result.stdout
        assert 'CPUAmpOptimWrapper' in result.stdout
        records = [record for record in logged(tmp_path) if 'loss' in record]
        assert len(records) == 4
        assert records[0]['lr'] == pytest.approx(2e-3 * 2 / 16)
        assert all(record['loss'] == record['loss'] for record in records), 'the loss must be a number'

    @pytest.mark.parametrize(
        'config',
        [
            pytest.param('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', marks=pytest.mark.slow),
            'configs/faster_rcnn/faster-rcnn_r50_fpn_ubn-backbone-gated_1x_coco.py',
        ],
        ids=['stock', 'ours'],
    )
    def test_coco_config_from_a_torchvision_checkpoint(self, digits, tmp_path, config):
        """ResNet-50 of BatchNorm to UBN: in MMDetection's own config by the command line alone, and in one of ours."""
        data = tmp_path / 'data'
        data.mkdir()
        for name in ('train2017', 'val2017'):
            (data / name).symlink_to(digits / name)
        for path in (digits / 'annotations').iterdir():
            content = json.loads(path.read_text())
            content['categories'] = [
                {'id': i, 'name': name} for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)
            ]
            (data / 'annotations').mkdir(exist_ok=True)
            (data / 'annotations' / path.name).write_text(json.dumps(content))
        torch.save(resnet50().state_dict(), tmp_path / 'resnet50.pth')
        options = [
            *data_options(data),
            f'model.backbone.init_cfg.checkpoint={tmp_path}/resnet50.pth',
            'model.backbone.init_cfg.prefix=None',
            'train_dataloader.dataset.pipeline.2.scale=(64,64)',
            'val_dataloader.dataset.pipeline.1.scale=(64,64)',
            'train_cfg.max_epochs=1',
        ]
        work_dir = tmp_path / 'run'
        arguments = ['--work-dir', work_dir, '--cfg-options', *options, 'model.backbone.norm_cfg.type=UBN']
        result = tool('train.py', config, *arguments)
        assert result.returncode == 0, result.stdout
        assert len(running_similarities(work_dir / 'epoch_1.pth')) == 53
        state_dict = checkpoint_of(work_dir / 'epoch_1.pth')['state_dict']
        # The frozen stem keeps what the BatchNorm checkpoint was converted to: 1 / sigmoid(1).
        expected = 1 / torch.sigmoid(torch.tensor(1.0))
        torch.testing.assert_close(state_dict['backbone.bn1.weight'], expected.expand(64))

    def test_a_config_in_pure_python(self, small, tmp_path):
        """UBN by its class in the config and, in the neck, by its name on the command line."""
        (tmp_path / 'base.py').write_text(in_pure_python(Config.fromfile(CONFIG)))
        lines = [
            'from mmengine.config import read_base',
            'with read_base():',
            '    from .base import *',
            'from mmubn import UBN',
            'model.update(dict(backbone=dict(norm_cfg=dict(type=UBN, threshold=0.2))))',
        ]
        (tmp_path / 'config.py').write_text('\n'.join(lines))
        options = ['--cfg-options', *small, 'train_cfg.max_epochs=1', 'model.neck.norm_cfg.type=UBN']
        result = tool('train.py', tmp_path / 'config.py', '--amp', '--work-dir', tmp_path / 'run', *options)
        assert result.returncode == 0, result.stdout
        assert len(running_similarities(tmp_path / 'run' / 'epoch_1.pth')) == 20 + 8
        assert "type='AtomicCheckpointHook'" in (tmp_path / 'run' / 'config.py').read_text()


@pytest.fixture
def toy_config(tmp_path):
    """One epoch of 4 iterations, for one process; for tests of what starts the processes, whatever they train."""
    toy.config(tmp_path, validate=False, epochs=1).dump(tmp_path / 'toy.py')
    return tmp_path / 'toy.py'


class TestSeveralProcesses:
    def test_a_killed_run_resumes_and_is_evaluated(self, small, tmp_path):
        options = ['--work-dir', tmp_path, '--cfg-options', *small]
        with (tmp_path / 'killed.log').open('w') as log:
            process = subprocess.Popen(
                [TOOLS / 'dist_train.sh', CONFIG, '2', *options, 'train_cfg.max_epochs=50'],
                cwd=ROOT,
                env=os.environ | {'PORT': free_port()},
                stdout=log,
                stderr=log,
            )
            deadline = time.monotonic() + 300
            while not (tmp_path / 'last_checkpoint').exists():
                assert process.poll() is None, (tmp_path / 'killed.log').read_text()
                assert time.monotonic() < deadline, (tmp_path / 'killed.log').read_text()
                time.sleep(0.05)
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()
            process.wait()
        last = Path((tmp_path / 'last_checkpoint').read_text())
        epoch = int(re.fullmatch(r'epoch_(\d+)\.pth', last.name).group(1))

        before = len(steps(tmp_path))
        for result in ranks(2, 'train.py', CONFIG, '--resume', *options, f'train_cfg.max_epochs={epoch + 1}'):
            assert result.returncode == 0, result.stdout
        # 8 images, 2 processes, 2 images each: 2 iterations an epoch, none of a finished epoch repeated.
        assert steps(tmp_path)[before:] == [2 * epoch + 1, 2 * epoch + 2]
        checkpoint = tmp_path / f'epoch_{epoch + 1}.pth'

        one, two = tmp_path / 'test1', tmp_path / 'test2'
        options = ['--cfg-options', *small]
        for result in (
            run(TOOLS / 'dist_test.sh', CONFIG, checkpoint, '2', '--work-dir', two, *options, PORT=free_port()),
            tool('test.py', CONFIG, checkpoint, '--work-dir', one, *options),
        ):
            assert result.returncode == 0, result.stdout
        assert coco(one) == coco(two) != {}, 'the evaluation must not depend on the number of processes'

    @pytest.mark.slow
    def test_four_processes_with_sync_ubn(self, small, tmp_path):
        options = ['train_cfg.max_epochs=1', 'train_dataloader.batch_size=1', 'model.backbone.norm_cfg.type=SyncUBN']
        for result in ranks(4, 'train.py', CONFIG, '--work-dir', tmp_path, '--cfg-options', *small, *options):
            assert result.returncode == 0, result.stdout
        assert steps(tmp_path) == [1, 2]
        assert (tmp_path / 'epoch_1.pth').is_file()

    def test_two_nodes_on_loopback(self, toy_config, tmp_path):
        command = [TOOLS / 'dist_train.sh', toy_config, '1', '--work-dir', tmp_path]
        port, nodes = free_port(), []
        for rank in ('0', '1'):
            nodes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ
                    | {'NNODES': '2', 'NODE_RANK': rank, 'MASTER_ADDR': '127.0.0.1', 'PORT': port}
                    | {'PYTHONPATH': TOY},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], '\n'.join(outputs)
        assert steps(tmp_path) == [1, 2], 'each of two processes has half of the samples'
        assert 'GPU number: 2' in outputs[0], 'MMEngine logs the number of processes under this name'

    @pytest.mark.slow
    def test_slurm(self, toy_config, tmp_path):
        """A stand-in for srun that starts two tasks on this machine."""
        srun = tmp_path / 'bin' / 'srun'
        srun.parent.mkdir()
        srun.write_text(
            '#!/usr/bin/env bash\n'
            f'echo "$@" > {tmp_path}/srun-arguments\n'
            'while [ "$1" != python ]; do shift; done\n'
            'for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & pids+=" $!"; done\n'
            'status=0; for pid in $pids; do wait $pid || status=$?; done; exit $status\n'
        )
        srun.chmod(0o755)
        result = run(
            TOOLS / 'slurm_train.sh',
            *('gpu-partition', 'ubn', toy_config, tmp_path / 'run'),
            PYTHONPATH=TOY,
            PATH=f'{srun.parent}:{os.environ["PATH"]}',
            MASTER_PORT=free_port(),
            GPUS='16',
            SRUN_ARGS='--quotatype=spot --time=60',
        )
        assert result.returncode == 0, result.stdout
        assert steps(tmp_path / 'run') == [1, 2]
        arguments = (tmp_path / 'srun-arguments').read_text().split()
        for expected in (
            '--partition=gpu-partition',
            '--job-name=ubn',
            '--ntasks=16',
            '--ntasks-per-node=8',
            '--time=60',
        ):
            assert expected in arguments


class TestBadInput:
    @pytest.mark.parametrize(
        ('arguments', 'messages'),
        [
            (['nowhere.py'], ['nowhere.py does not exist']),
            (
                [CONFIG, '--cfg-options', 'train_dataloader.dataset.data_root=gone/'],
                ['gone/annotations', 'digits_to_coco'],
            ),
            (
                ['configs/faster_rcnn/faster-rcnn_r50_fpn_ubn-backbone_1x_coco.py'],
                ['annotations/instances_train2017.json'],
            ),
            ([CONFIG, '--resume', 'gone.pth'], ['gone.pth does not exist']),
            ([CONFIG, '--cfg-options', 'train_cfg.max_epochs=0'], ['train_cfg.max_epochs is 0: expected at least 1']),
        ],
        ids=['config', 'data', 'coco', 'resume', 'nothing to train'],
    )
    def test_training_ends_in_one_line(self, arguments, messages):
        result = tool('train.py', *arguments)
        assert result.returncode == 2, result.stdout
        last = result.stdout.strip().splitlines()[-1]
        assert last.startswith('error: ')
        assert all(message in last for message in messages), last
        assert 'Traceback' not in result.stdout

    @pytest.mark.parametrize(
        ('option', 'messages'),
        [
            ('model.backbone.norm_cfg.type=UBNX', ['UBNX', 'model.backbone.norm_cfg']),
            ('model.roi_head.bbox_head.num_classes=7', ['7', '10']),
        ],
        ids=['norm type', 'classes'],
    )
    def test_a_config_that_does_not_fit_ends_in_one_line(self, small, tmp_path, option, messages):
        result = tool('train.py', CONFIG, '--work-dir', tmp_path, '--cfg-options', *small, option)
        assert result.returncode == 2, result.stdout
        last = result.stdout.strip().splitlines()[-1]
        assert last.startswith('error: ')
        assert all(message in last for message in messages), last

    def test_a_checkpoint_that_does_not_fit_ends_in_one_line(self, small, tmp_path, trained):
        checkpoint = checkpoint_of(trained / 'epoch_2.pth')
        del checkpoint['state_dict']['backbone.layer1.0.bn1.scale_bias']
        torch.save(checkpoint, tmp_path / 'broken.pth')
        result = tool('test.py', CONFIG, tmp_path / 'broken.pth', '--work-dir', tmp_path, '--cfg-options', *small)
        assert result.returncode == 2, result.stdout
        last = result.stdout.strip().splitlines()[-1]
        assert last.startswith('error: ')
        assert 'backbone.layer1.0.bn1.scale_bias is missing' in last

    def test_a_checkpoint_of_another_model_ends_in_one_line(self, small, tmp_path, trained):
        checkpoint = trained / 'epoch_2.pth'
        options = ['--work-dir', tmp_path, '--cfg-options', *small, 'model.roi_head.mask_head=None']
        result = tool('test.py', CONFIG, checkpoint, *options, 'model.roi_head.mask_roi_extractor=None')
        assert result.returncode == 2, result.stdout
        last = result.stdout.strip().splitlines()[-1]
        assert last.startswith(f'error: {checkpoint} does not fit this MaskRCNN: 8 keys are not in the model (roi_head')
        assert 'from a training of MaskRCNN, epoch 2, 10 classes (0, 1, 2 and 7 more)' in last
        assert last.endswith('if you mean it, add --allow-partial.')

    def test_resuming_with_another_norm_ends_in_one_line(self, toy_config, tmp_path):
        run_here = [toy_config, '--work-dir', tmp_path / 'run']
        for result in ranks(2, 'train.py', *run_here):
            assert result.returncode == 0, result.stdout
        last = tmp_path / 'run' / 'epoch_1.pth'
        another = ['--cfg-options', 'train_cfg.max_epochs=2', '+model.kernel_size=5']
        for results in (
            ranks(2, 'train.py', *run_here, '--resume', *another),
            [tool('train.py', *run_here, '--resume', last, *another)],
        ):
            assert [result.returncode for result in results] == [2] * len(results), results[0].stdout
            (line,) = [line for result in results for line in result.stdout.splitlines() if line.startswith('error: ')]
            assert 'layers.1 is UBN with kernel_size=3 there and UBN with kernel_size=5 here' in line
            assert f'load_from={last}' in line
            assert not any('Traceback' in result.stdout for result in results)
        result = tool('train.py', toy_config, '--work-dir', tmp_path / 'new', *another, f'load_from={last}')
        assert result.returncode == 0, result.stdout

    def test_missing_imagenet_checkpoint(self, digits):
        config = 'configs/faster_rcnn/faster-rcnn_r50_fpn_ubn-backbone_1x_coco.py'
        result = tool('train.py', config, '--cfg-options', *data_options(digits))
        assert result.returncode == 2, result.stdout
        last = result.stdout.strip().splitlines()[-1]
        for message in ('checkpoints/resnet50-ubn_in1k.pth does not exist', 'imagenet_checkpoints', 'README.md'):
            assert message in last

    def test_no_object_found_is_no_evaluation(self, small, tmp_path, trained):
        """MMDetection then gives no metric at all."""
        options = ('--work-dir', tmp_path, '--cfg-options', *small, 'model.test_cfg.rcnn.score_thr=1.0')
        result = tool('test.py', CONFIG, trained / 'epoch_2.pth', *options)
        assert result.returncode == 2, result.stdout
        assert 'error: the evaluation gave no metric: MMDetection measures none where not one object' in result.stdout

    def test_missing_checkpoint_to_evaluate(self):
        result = tool('test.py', CONFIG, 'gone.pth')
        assert result.returncode == 2, result.stdout
        assert 'gone.pth does not exist; train one' in result.stdout

    def test_predictions_in_another_format(self, trained):
        result = tool('test.py', CONFIG, trained / 'epoch_2.pth', '--out', 'predictions.json')
        assert result.returncode == 2, result.stdout
        assert 'predictions.json' in result.stdout

    def test_auto_scale_lr_without_a_base_batch_size(self, small):
        result = tool('train.py', CONFIG, '--auto-scale-lr', '--cfg-options', *small, 'auto_scale_lr._delete_=True')
        assert result.returncode == 2, result.stdout
        assert 'base_batch_size' in result.stdout

    def test_one_message_from_many_processes(self):
        results = ranks(2, 'train.py', 'nowhere.py')
        assert [result.returncode for result in results] == [2, 2]
        assert ''.join(result.stdout for result in results).count('nowhere.py does not exist') == 1

    @pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
    def test_usage(self, script):
        result = run(TOOLS / script)
        assert result.returncode == 2
        assert 'usage:' in result.stdout
