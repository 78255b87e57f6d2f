"""Pooled terms over the images of a padded batch: against an independent computation, and an image alone."""

import asyncio
import copy
import pickle
import threading
from pathlib import Path

import oracle
import pytest
import torch
from helpers import randomize
from networks import TYPES
from torch import nn

import mmubn
from mmubn import UBN
from mmubn.layers import areas
from mmubn.layers.areas import image_areas, size_in_map

SIZES = [(8, 8), (5, 7), (3, 8), (1, 1)]
BATCH = (8, 8)
POOLED = [norm for norm in TYPES if norm is not mmubn.BNET]


def padded(sizes=SIZES, channels=4, dtype=torch.float32):
    """A batch of images of these sizes, with something other than zeros for padding: as maps within a network have."""
    x = torch.randn(len(sizes), channels, *BATCH, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return x + torch.arange(len(sizes))[:, None, None, None]


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert not areas.is_used()
    assert areas.current() is None


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('norm', POOLED)
def test_an_image_is_what_it_is_alone(norm, backend, channels_last):
    """Bit for bit, its neighbors at the border included, and zeros beside it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer, x = randomize(norm(4)).eval(), padded().to(memory_format=layout)
    with torch.no_grad(), image_areas(SIZES, BATCH):
        y = layer(x)
    assert y.is_contiguous(memory_format=layout)
    for n, (h, w) in enumerate(SIZES):
        alone = layer(x[n : n + 1, :, :h, :w].contiguous(memory_format=layout))
        assert torch.equal(y[n, :, :h, :w], alone[0]), n
        assert y[n, :, h:].eq(0).all()
        assert y[n, :, :, w:].eq(0).all()
    assert not torch.allclose(layer(x)[1, :, :4, :4], y[1, :, :4, :4], rtol=1e-2), 'without, the padding is seen'


@pytest.mark.parametrize('norm', POOLED)
def test_against_the_oracle(norm, backend):
    """An independent computation in float64, of each image."""
    layer, x = randomize(norm(4, dtype=torch.float64)).eval(), padded(dtype=torch.float64)
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with torch.no_grad(), image_areas(SIZES, BATCH):
        y = layer(x)
    for n, (h, w) in enumerate(SIZES):
        parameters = dict(layer.named_parameters())
        if 'neighbor_weight' in parameters:
            parameters['neighbor_weight'] = parameters['neighbor_weight'].view(4, 8)
        expected, _ = oracle.norm(x[n : n + 1, :, :h, :w], parameters, state, training=False, scaling=layer.scaling)
        torch.testing.assert_close(y[n : n + 1, :, :h, :w], expected, rtol=1e-10, atol=1e-10)


def test_a_norm_without_pooled_terms_is_as_ever():
    layer, x = randomize(mmubn.BNET(4)).eval(), padded()
    with image_areas(SIZES, BATCH):
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize('norm', TYPES)
def test_without_padding_the_same_path(norm, monkeypatch, backend):
    layer, x = randomize(norm(4)).eval(), padded()
    expected = layer(x)
    calls = []
    monkeypatch.setattr(layer, '_normalize', lambda x: calls.append(x.shape) or type(layer)._normalize(layer, x))
    with image_areas([BATCH] * 4, BATCH):
        assert not areas.is_used()
        assert torch.equal(layer(x), expected)
    with image_areas([(8, 8)] * 3 + [(7, 8)], BATCH):  # at stride 8 all images fill the map
        layer(x[:, :, :1, :1])
    assert calls == [x.shape, (4, 4, 1, 1)], 'in one go'


def test_training_is_as_without():
    layer, x = randomize(UBN(4)), padded()
    expected, other = copy.deepcopy(layer)(x), copy.deepcopy(layer)
    with image_areas(SIZES, BATCH):
        assert torch.equal(other(x), expected)
        frozen = UBN(4, track_running_stats=False).eval()
        assert torch.equal(frozen(x), UBN(4).train()(x)), "the batch's own statistics are those of the whole batch"


def test_gradients():
    layer = randomize(UBN(4)).eval().double()
    x = padded(dtype=torch.float64)[:2].requires_grad_()

    def function(x):
        with image_areas(SIZES[:2], BATCH):
            return layer(x)

    assert torch.autograd.gradcheck(function, (x,))


def test_a_forward_that_runs_again_is_an_error():
    """By then the areas are not known: its gradient would be another function's."""
    layer, x = randomize(UBN(4)).eval(), padded().requires_grad_()
    for reentrant in (False, True):
        with image_areas(SIZES, BATCH), pytest.raises(RuntimeError, match='with_cp=False'):
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)


def test_half_precision_and_autocast():
    layer, x = randomize(UBN(4)).eval(), padded()
    with torch.no_grad(), image_areas(SIZES, BATCH):
        y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x.bfloat16().float()).bfloat16().float(), rtol=1e-2, atol=1e-2)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert torch.equal(layer(x), layer(x).float())


class TestSizes:
    @pytest.mark.parametrize('batch', [1, 2, 5, 31, 32, 33, 64, 100, 127, 128, 200])
    def test_the_map_of_the_image_alone(self, batch):
        """Strides 2 to 128 by convolutions and poolings of MMDetection's ResNets and necks, for all sizes of images."""
        layers = [
            nn.Conv2d(1, 1, 7, 2, 3),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(1, 1, 3, 2, 1),
            nn.Conv2d(1, 1, 1, 2),
            nn.MaxPool2d(1, 2),
            nn.Conv2d(1, 1, 3, 2, 1),
            nn.MaxPool2d(2, 2, ceil_mode=True),
        ]

        def lengths(size):
            x = torch.zeros(1, 1, size, 1, device='meta')
            found = [size]
            for layer in layers:
                x = layer.to('meta')(x)
                found.append(x.shape[2])
            return found

        of_batch = lengths(batch)
        for image in {1, 2, 3, batch // 3, batch // 2, batch - 9, batch - 1, batch} & set(range(1, batch + 1)):
            assert [size_in_map(image, batch, length) for length in of_batch] == lengths(image), image

    @pytest.mark.parametrize(
        ('image', 'batch', 'length', 'expected'),
        [
            (140, 280, 20, 10),  # patches of 14
            (141, 280, 20, 11),
            (5, 8, 16, 10),  # upsampled
            (30, 96, 32, 10),  # stride 3
            (5, 8, 7, None),  # a convolution without padding
            (40, 100, 7, 3),  # ceil(100 / 16)
            (40, 100, 8, None),
            (128, 256, 5, None),  # an adaptive pooling
        ],
    )
    def test_others(self, image, batch, length, expected):
        assert size_in_map(image, batch, length) == expected


class TestErrors:
    @pytest.mark.parametrize(
        ('sizes', 'message'),
        [
            ([(8, 9)], 'image 0 of 8x9 is larger than its batch of 8x8'),
            ([(8, 8), (9, 1)], 'image 1 of 9x1 is larger'),
            ([(0, 8)], 'positive integers'),
            ([(8, 8, 3)], 'pairs'),
            ([(8.0, 8)], 'positive integers'),
        ],
    )
    def test_sizes(self, sizes, message):
        with pytest.raises(ValueError, match=message), image_areas(sizes, BATCH):
            pytest.fail('nothing may run')

    @pytest.mark.parametrize(
        ('sizes', 'batch', 'received'),
        [
            ([(8, 8)], 8, '8'),
            ((8, 8), BATCH, '8'),
            (None, BATCH, 'None'),
            ([(8, 8), None], BATCH, 'None'),
            ([BATCH], None, 'None'),
            ([BATCH], (8, 8, 8), r'\(8, 8, 8\)'),
            (['88'], BATCH, "'88'"),
        ],
    )
    def test_what_is_no_pair(self, sizes, batch, received):
        message = rf'^sizes and batch must be pairs \(height, width\) of positive integers, got {received}\.$'
        with pytest.raises(ValueError, match=message), image_areas(sizes, batch):
            pytest.fail('nothing may run')

    def test_what_is_no_map_of_the_batch(self):
        layer = UBN(4).eval()
        with image_areas(SIZES, BATCH):
            with pytest.raises(ValueError, match=r'\(5, 4, 8, 8\) is not one map of each of the 4 images'):
                layer(torch.zeros(5, 4, 8, 8))
            with pytest.raises(ValueError, match='map of 7x8 is no batch of 8x8 at any stride'):
                layer(torch.zeros(4, 4, 7, 8))
        with image_areas([], BATCH), pytest.raises(ValueError, match='each of the 0 images'):
            layer(torch.zeros(4, 4, 8, 8))

    @pytest.mark.filterwarnings('ignore')
    def test_a_graph(self):
        layer = UBN(4).eval()
        with image_areas(SIZES, BATCH):
            with pytest.raises(RuntimeError, match='trace or export without image areas'):
                torch.jit.trace(layer, padded())
            with pytest.raises(RuntimeError, match='trace or export without image areas'):
                torch.export.export(layer, (padded(),))


def test_a_compiled_model_breaks_its_graph_where_there_is_padding():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), randomize(UBN(4)), nn.ReLU()).eval()
    x = padded()
    with torch.no_grad():
        compiled = torch.compile(net, backend='eager')
        for _ in range(2):
            torch.testing.assert_close(compiled(x), net(x))
            with image_areas(SIZES, BATCH):
                expected = net(x)
                assert torch.equal(compiled(x), expected)
            with image_areas(SIZES[::-1], BATCH):
                assert torch.equal(compiled(x), net(x)), 'sizes are no part of a graph'
    torch._dynamo.reset()


class TestState:
    def test_of_one_thread(self):
        layer, x = randomize(UBN(4)).eval(), padded()
        expected, found = layer(x), []
        with image_areas(SIZES, BATCH):
            thread = threading.Thread(target=lambda: found.append(layer(x)))
            thread.start()
            thread.join()
        assert torch.equal(found[0], expected)

    def test_of_one_task(self):
        """While a task of asyncio waits, others run in its thread."""
        layer, x = randomize(UBN(4)).eval(), padded()
        outputs = {None: layer(x)}
        for sizes in (tuple(SIZES), tuple(SIZES[::-1])):
            with image_areas(sizes, BATCH):
                outputs[sizes] = layer(x)

        async def within(sizes):
            for _ in range(3):
                with image_areas(sizes, BATCH):
                    await asyncio.sleep(0)
                    assert torch.equal(layer(x), outputs[sizes])
                    assert torch.equal(await asyncio.to_thread(layer, x), outputs[sizes])
                await asyncio.sleep(0)
                assert torch.equal(layer(x), outputs[None])

        async def without():
            for _ in range(9):
                assert torch.equal(layer(x), outputs[None])
                await asyncio.sleep(0)

        async def cancelled():
            with image_areas(SIZES, BATCH):
                await asyncio.sleep(60)

        async def later():
            await asyncio.sleep(0)
            return layer(x)

        async def all_of_them():
            other = asyncio.create_task(cancelled())
            await asyncio.gather(*map(within, [*filter(None, outputs)] * 2), without())
            other.cancel()
            with image_areas(SIZES, BATCH):
                task = asyncio.create_task(later())
            with image_areas(SIZES[::-1], BATCH):
                y = await task
            assert torch.equal(y, outputs[None]), 'the areas in which the task began have ended'

        with torch.no_grad():
            asyncio.run(all_of_them())

    def test_of_a_generator_that_another_context_ends(self):
        def generator():
            with image_areas(SIZES, BATCH):
                yield

        paused = generator()
        next(paused)
        assert areas.current() is not None
        thread = threading.Thread(target=paused.close)
        thread.start()
        thread.join()
        assert areas.current() is None

    @pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
    def test_after_an_error(self, error):
        with pytest.raises(error), image_areas(SIZES, BATCH):
            raise error
        assert areas.current() is None

    def test_the_innermost_holds(self):
        with image_areas([(8, 8), (4, 4)], BATCH):
            with image_areas([(6, 6)], BATCH):
                assert areas.current().sizes == ((6, 6),)
            assert areas.current().sizes == ((8, 8), (4, 4))
            with image_areas([BATCH], BATCH):
                assert areas.current() is None

    def test_none_of_the_layer(self):
        layer = randomize(UBN(4)).eval()
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        with image_areas(SIZES, BATCH):
            layer(padded())
            other = pickle.loads(pickle.dumps(layer))
        assert layer.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        assert torch.equal(other(padded()), layer(padded()))


def test_the_page():
    """docs/padding.md: its example runs; where no convolution sees the padding, an image is what it is alone."""
    page = (Path(__file__).resolve().parents[2] / 'docs' / 'padding.md').read_text()
    (example,) = [block.partition('```')[0] for block in page.split('```python\n') if 'image_areas([' in block]
    names = {}
    exec(example, names)
    backbone = randomize(names['backbone'])
    x = torch.randn(names['batch'].shape, generator=torch.Generator().manual_seed(0))
    alone = backbone(x[1:, :, :40, :56])[0, :, :19, :27]
    with torch.no_grad(), image_areas([(64, 64), (40, 56)], batch=(64, 64)):
        torch.testing.assert_close(backbone(x)[1, :, :19, :27], alone)
    assert not torch.allclose(backbone(x)[1, :, :19, :27], alone, rtol=1e-3)
