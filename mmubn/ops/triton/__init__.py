"""UBN's forward and backward as GPU kernels in Triton.

Inputs are float32, float16 or bfloat16; everything that is not x, dy, y or dx is float32, and so is every sum. The
steps are those of :class:`mmubn.ops.Backend`, each a function that launches its kernels at once::

    forward    x ──► instance_moments ──► gated_coefficients ──► apply ──► y
    backward   x, dy ──► tap_sums ──► coefficients_backward ──► input_gradient ──► dx

(``statistics_coefficients`` where no similarity decides, ``coefficients`` with the running statistics.)

Between a layer's input and its output only ``instance_moments``, ``apply``, ``tap_sums`` and ``input_gradient`` touch
data of the size of x: the forward reads x twice (and the samples of the similarity once more) and writes y, the
backward reads x and dy twice and writes dx, which is what BatchNorm moves.

No function has a gradient of its own, writes into its input, waits for the device or uses atomics: the same input
gives the same bits. The operator of the same name in ``torch.ops.mmubn`` does the same and is what ``torch.compile``
can trace.

**Layouts.** One kernel serves NCHW and channels-last. A program owns a block of planes and goes over their pixels. In
NCHW the planes of all samples form one list and pixels are neighbours in memory; in channels-last a block stays within
one sample and planes (channels) are neighbours. Any other layout is copied to one of the two first.

**Tiles.** Where a pixel's k x k neighbourhood is needed, a lane (a thread, for one or two planes) owns a tile of
pixels: it loads them and k // 2 pixels around them once, keeps them in registers and computes all of the tile with
them.

**Reductions** run in two stages where one program per plane would leave the device idle: parts of the map first, then
the parts in the order of their numbers.

Triton is needed to launch, not to import. Files, each importing from those above it alone:

- :mod:`~mmubn.ops.triton.device`: what kernels share.
- :mod:`~mmubn.ops.triton.runtime`: where kernels can be launched, and the launch.
- :mod:`~mmubn.ops.triton.inputs`: checks and layouts of inputs.
- :mod:`~mmubn.ops.triton.tiling`: how programs and lanes share a map.
- ``moments``, ``similarity``, ``coefficients``, ``apply``, ``tap_sums``, ``input_gradient``: the steps, each with its
  kernels and the functions that launch them.
- :mod:`~mmubn.ops.triton.operators`: all these functions, and their operators for ``torch.compile``.
- :mod:`~mmubn.ops.triton.architecture`, :mod:`~mmubn.ops.triton.probe`: whether they work on a GPU, before their first
  use there.
- :mod:`~mmubn.ops.triton.backend`: :class:`~mmubn.ops.triton.backend.TritonBackend`.
"""
