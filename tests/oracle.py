"""The norms written a second time, independently: float64, loops over samples, channels and taps, in UBN's order.

It shares nothing with ``mmubn``: the rectified input, its variance, the pooled features and the length of a sample are
computed from the data itself where the package uses closed forms, and the similarity goes through every pair.
"""

import math

import torch


def pairwise_similarity(x, max_samples=16, groups=None):
    """Mean cosine over all ordered pairs of different samples; None with fewer than two.

    ``groups``: sizes of groups of consecutive samples; then only pairs inside a group count, each group's first
    ``max_samples`` samples.
    """
    total, pairs = 0.0, 0
    for group in x.split(groups or len(x)):
        samples = [sample.flatten().double() for sample in group[:max_samples]]
        for i, f in enumerate(samples):
            for j, g in enumerate(samples):
                if i != j:
                    norms = math.sqrt(float(f @ f)) * math.sqrt(float(g @ g))
                    total += float(f @ g) / norms if norms > 0 else 0.0
                    pairs += 1
    return total / pairs if pairs else None


def fresh_state(channels):
    return {
        'running_mean': torch.zeros(channels, dtype=torch.float64),
        'running_var': torch.ones(channels, dtype=torch.float64),
        'running_similarity': 1.0,
        'num_batches_tracked': 0,
    }


def ubn(x, parameters, state, training=True, threshold=0.15, **options):
    """One call of UBN: :func:`norm` with its gate and its factor."""
    return norm(x, parameters, state, training, scaling='rectified', threshold=threshold, **options)


def norm(
    x,
    parameters,
    state,
    training=True,
    scaling=None,
    eps=1e-5,
    momentum=0.1,
    threshold=None,
    similarity_momentum=0.1,
    similarity_samples=16,
    calibrate_bias=False,
    groups=None,
):
    """One call of a norm. Returns (output, new state); gradients flow to ``x`` and ``parameters`` through autograd.

    ``x``: (N, C, H, W) or (N, C). ``parameters``: weight, bias and, where the part is on, neighbor_weight,
    center_weight, scale_weight, scale_bias. ``scaling``: see :func:`factor`; None, or no scale_weight, for none.
    ``threshold``: of the gate; None for none.
    """
    shape = x.shape
    x = x[:, :, None, None] if x.dim() == 2 else x
    samples, channels, height, width = x.shape
    state = dict(state)
    condensed = True
    if training and threshold is not None:
        s = pairwise_similarity(x.detach(), similarity_samples, groups)
        if s is not None:
            state['running_similarity'] = (1 - similarity_momentum) * state[
                'running_similarity'
            ] + similarity_momentum * s
        condensed = state['running_similarity'] > threshold

    normalized, means, variances = [], [], []  # normalized[c][n] is a map
    for c in range(channels):
        planes = [x[n, c] for n in range(samples)]
        if 'center_weight' in parameters:
            planes = [p + parameters['center_weight'][c] * (p.sum() / (height * width)) for p in planes]
        if training and condensed:
            values = torch.cat([p.flatten() for p in planes])
            mean = values.sum() / values.numel()
            var = ((values - mean) ** 2).sum() / values.numel()
            means.append(mean.detach())
            variances.append(var.detach() * values.numel() / max(values.numel() - 1, 1))
        else:
            mean, var = state['running_mean'][c], state['running_var'][c]
        normalized.append([(p - mean) / torch.sqrt(var + eps) for p in planes])

    neighbors = parameters.get('neighbor_weight')
    size = 1 if neighbors is None else math.isqrt(neighbors.numel() // channels + 1)
    half = size // 2
    out_channels = []
    for c in range(channels):
        if neighbors is None:
            taps = [parameters['weight'][c]]
        else:
            taps = list(neighbors.view(channels, -1)[c])
            taps.insert(len(taps) // 2, parameters['weight'][c])
        r = [factor(x, normalized, n, c, parameters, scaling, eps) for n in range(samples)]
        z = torch.stack([r[n] * normalized[c][n] for n in range(samples)])
        padded = torch.nn.functional.pad(z, (half,) * 4) if half else z
        y = sum(taps[i * size + j] * padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size))
        bias = parameters['bias'][c]
        out_channels.append(torch.stack([y[n] + bias * (r[n] if calibrate_bias else 1.0) for n in range(samples)]))

    if training and condensed:
        state['running_mean'] = (1 - momentum) * state['running_mean'] + momentum * torch.stack(means)
        state['running_var'] = (1 - momentum) * state['running_var'] + momentum * torch.stack(variances)
        state['num_batches_tracked'] += 1
    return torch.stack(out_channels, dim=1).reshape(shape), state


def factor(x, normalized, n, c, parameters, scaling, eps):
    """r of sample n and channel c.

    ``'rectified'`` (UBN, RBN): sigmoid(w_v mean_hw x_s + w_b); ``'instance'`` (IEBN): sigmoid(w_v mean_hw x + w_b);
    ``'unitized'`` (UnitizedBN): w_v / sqrt(q + eps) + 1 - w_v with q = sum_chw x_s^2 / (HW)^2.
    """
    if scaling is None or 'scale_weight' not in parameters:
        return 1.0
    weight, size = parameters['scale_weight'][c], x[n, c].numel()
    if scaling == 'unitized':
        q = sum((planes[n] ** 2).sum() for planes in normalized) / size**2
        return weight / torch.sqrt(q + eps) + 1 - weight
    pooled = (x[n, c] if scaling == 'instance' else normalized[c][n]).sum() / size
    return 1 / (1 + torch.exp(-(weight * pooled + parameters['scale_bias'][c])))
