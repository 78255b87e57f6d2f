// A whole layer in evaluation: the mean of each map, what follows from it, and the convolution.

#pragma once

#include "convolution.h"
#include "moments.h"

namespace {

template <class T, class A = Arithmetic<T>>
inline PlaneCoefficients<A> coefficients_for(const EvaluateArguments<T>& o, Index c, A a) {
  const A shift = o.shift[c] + at(o.center_weight, 0, 0, c) * a;
  const A scale = o.scale_weight ? 1 / (1 + std::exp(-(o.scale_weight[c] * (a + shift) + o.scale_bias[c]))) : A(1);
  return {-shift, scale, o.calibrate_bias ? scale * o.bias[c] : o.bias[c]};
}

template <class T>
void evaluate(const EvaluateArguments<T>& o) {
  using A = Arithmetic<T>;
  const bool needs_mean = o.center_weight || o.scale_weight;
  const Index size = o.h * o.w, planes = o.n * o.c;
  ConvolveArguments<T> convolution{};
  convolution.input = o.x;
  convolution.output = o.output;
  convolution.kernel = o.kernel;
  convolution.n = o.n, convolution.c = o.c, convolution.h = o.h, convolution.w = o.w;
  convolution.threads = o.threads;
  if (!o.channels_last) {
    // A plane is read twice in a row: the second time from the cache.
    with_kernel_size(o.kernel_size, [&](auto k) {
      convolve_planes<decltype(k)::value>(convolution, [&](Index n, Index c) {
        return coefficients_for(o, c, needs_mean ? mean_of_plane(o.x + (n * o.c + c) * size, size) : A(0));
      });
    });
    return;
  }
  std::vector<A> means(planes), centers(planes), scales(planes), biases(planes);
  if (needs_mean) {
    MomentsArguments<T> moments{};
    moments.x = o.x, moments.a = means.data();
    moments.n = o.n, moments.c = o.c, moments.pixels = size, moments.threads = o.threads;
    moments_of_pixels(moments);
  }
  for (Index p = 0; p < planes; ++p) {
    const PlaneCoefficients<A> own = coefficients_for(o, p % o.c, means[p]);
    centers[p] = own.center, scales[p] = own.scale, biases[p] = own.bias;
  }
  convolution.center = centers.data(), convolution.scale = scales.data(), convolution.bias = biases.data();
  convolution.center_step = convolution.scale_step = convolution.bias_step = o.c;
  with_kernel_size(o.kernel_size, [&](auto k) { convolve_pixels<decltype(k)::value>(convolution); });
}

}  // namespace
