// The (N, C) steps between the passes over x.

#pragma once

#include "arguments.h"

namespace {

constexpr Index BLOCK = 64;  // channels at a time

// As torch.lerp: exact at both ends.
template <class A>
inline A lerp(A start, A end, A weight) {
  return weight < A(0.5) ? start + weight * (end - start) : end - (end - start) * (1 - weight);
}

// functional.batch_statistics and functional.select_statistics.
template <class A>
void statistics(const StatisticsArguments<A>& o) {
  const A unbias = A(double(o.num_values) / (o.num_values - 1 + (o.num_values <= 1))), m = A(o.momentum);
  const bool condensed = *o.condensed;
  for (Index first = 0; first < o.c; first += BLOCK) {
    const Index channels = std::min(BLOCK, o.c - first);
    A sums[BLOCK] = {}, variances[BLOCK] = {}, squares[BLOCK] = {};
    for (Index i = 0; i < o.n; ++i)
      for (Index k = 0; k < channels; ++k) {
        const A value = o.a[i * o.c + first + k];
        sums[k] += value + at(o.center_weight, 0, 0, first + k) * value;
        variances[k] += o.v[i * o.c + first + k];
      }
    for (Index k = 0; k < channels; ++k) sums[k] /= A(o.n);
    for (Index i = 0; i < o.n; ++i)
      for (Index k = 0; k < channels; ++k) {
        const A value = o.a[i * o.c + first + k];
        const A deviation = value + at(o.center_weight, 0, 0, first + k) * value - sums[k];
        squares[k] += deviation * deviation;
      }
    for (Index k = 0; k < channels; ++k) {
      const Index channel = first + k;
      const A batch = sums[k], spread = variances[k] / A(o.n) + squares[k] / A(o.n), unbiased = spread * unbias;
      const A old_mean = o.running_mean[channel], old_var = o.running_var[channel];
      const bool moves = condensed && std::isfinite(batch) && std::isfinite(unbiased);
      o.mean[channel] = condensed ? batch : old_mean;
      o.var[channel] = condensed ? spread : old_var;
      o.new_mean[channel] = moves ? lerp(old_mean, batch, m) : old_mean;
      o.new_var[channel] = moves ? lerp(old_var, unbiased, m) : old_var;
    }
  }
}

// functional.coefficients up to the sigmoid: center, 1 / sqrt(var + eps) and, where there is one, its argument.
template <class A>
void coefficients(const CoefficientsArguments<A>& o) {
  for (Index k = 0; k < o.c; ++k) o.inv_std[k] = 1 / std::sqrt(o.var[k] + A(o.eps));
  for (Index i = 0; i < o.n; ++i)
    for (Index k = 0; k < o.c; ++k) {
      const A value = o.a[i * o.c + k], subtracted = o.mean[k] - at(o.center_weight, 0, 0, k) * value;
      o.center[i * o.c + k] = subtracted;
      if (!o.logit) continue;
      const A pooled = o.rectified ? (value - subtracted) * o.inv_std[k] : value;
      o.logit[i * o.c + k] = o.scale_weight[k] * pooled + o.scale_bias[k];
    }
}

// backend.Backend.coefficients_backward.
template <class A>
void coefficients_backward(const CoefficientsBackwardArguments<A>& o) {
#pragma omp parallel for num_threads(o.threads) if (o.threads > 1) schedule(static)
  for (Index first = 0; first < o.c; first += BLOCK) {
    const Index channels = std::min(BLOCK, o.c - first);
    A inv_std[BLOCK], d_scale[BLOCK], turned[BLOCK];
    A bias[BLOCK] = {}, d_inv_std[BLOCK] = {}, d_weight[BLOCK] = {}, d_logits[BLOCK] = {}, d_mean[BLOCK] = {},
      d_centering[BLOCK] = {};
    for (Index k = 0; k < channels; ++k) inv_std[k] = 1 / std::sqrt(o.var[first + k] + A(o.eps));
    for (Index t = 0; t < o.taps; ++t) std::fill_n(o.d_taps + t * o.c + first, channels, A(0));
    for (Index i = 0; i < o.n; ++i) {
      std::fill_n(d_scale, channels, A(0));
      std::fill_n(turned, channels, A(0));
      for (Index t = 0; t < o.taps; ++t) {
        const A* const products = o.products + (i * o.taps + t) * o.c + first;
        const A* const sums = o.sums + (i * o.taps + t) * o.c + first;
        for (Index k = 0; k < channels; ++k) {
          const A tap = o.kernel[(first + k) * o.taps + t];
          d_scale[k] += products[k] * tap;
          turned[k] += sums[k] * tap;
          o.d_taps[t * o.c + first + k] += o.scale[i * o.scale_step + first + k] * products[k];
        }
      }
      for (Index k = 0; k < channels; ++k) {
        const Index channel = first + k;
        const A value = o.a ? o.a[i * o.c + channel] : A(0), deviation = value - o.center[i * o.center_step + channel];
        A d_center = -o.scale[i * o.scale_step + channel] * turned[k], d_a = 0;
        A db = o.sums[(i * o.taps + o.taps / 2) * o.c + channel];
        if (o.r) {
          const A factor = o.r[i * o.c + channel];
          A d_r = d_scale[k] * inv_std[k];
          if (o.calibrated_bias) {
            d_r += db * o.calibrated_bias[channel];
            db *= factor;
          }
          d_inv_std[k] += d_scale[k] * factor;
          const A d_logit = d_r * factor * (1 - factor);
          d_weight[k] += d_logit * (o.rectified ? deviation * inv_std[k] : value);
          d_logits[k] += d_logit;
          d_a = d_logit * o.scale_weight[channel];
          if (o.rectified) {
            d_inv_std[k] += d_a * deviation;
            d_a *= inv_std[k];
            d_center -= d_a;
          }
        } else {
          d_inv_std[k] += d_scale[k];
        }
        bias[k] += db;
        d_mean[k] += d_center;
        if (o.center_weight) {
          d_centering[k] -= d_center * value;
          d_a -= o.center_weight[channel] * d_center;
        }
        if (o.offset) o.offset[i * o.c + channel] = d_a;
      }
    }
    if (o.slope) {
      const A share = *o.condensed ? A(o.pixels / o.num_values) : A(0);
      A d_var[BLOCK];
      for (Index k = 0; k < channels; ++k) {
        d_var[k] = A(-0.5) * d_inv_std[k] * inv_std[k] * inv_std[k] * inv_std[k];
        o.slope[first + k] = A(2) / A(o.pixels) * (share * d_var[k]);
      }
      for (Index i = 0; i < o.n; ++i)
        for (Index k = 0; k < channels; ++k) {
          const Index channel = first + k;
          const A gain = 1 + at(o.center_weight, 0, 0, channel), value = o.a[i * o.c + channel];
          const A d_m = share * (d_mean[k] + 2 * d_var[k] * (gain * value - o.mean[channel]));
          d_centering[k] += d_m * value;
          o.offset[i * o.c + channel] += gain * d_m;
        }
    }
    if (o.offset)
      for (Index i = 0; i < o.n; ++i)
        for (Index k = 0; k < channels; ++k) o.offset[i * o.c + first + k] /= A(o.pixels);
    std::copy_n(bias, channels, o.d_bias + first);
    if (o.center_weight) std::copy_n(d_centering, channels, o.d_center_weight + first);
    if (o.r) {
      std::copy_n(d_weight, channels, o.d_scale_weight + first);
      std::copy_n(d_logits, channels, o.d_scale_bias + first);
    }
  }
}

}  // namespace
