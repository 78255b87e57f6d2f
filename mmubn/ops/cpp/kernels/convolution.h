// The depthwise convolution of the forward, and that of the gradient of x.

#pragma once

#include "arguments.h"
#include "rows.h"

namespace {

// A convolution along a line of vectors: of step q it is given the K inputs beside q and returns the output K / 2 steps
// before, so that every input is loaded once for the K outputs that it has a part in.
template <int K, class A>
class Slide {
 public:
  explicit Slide(const Vector<A>& bias) : bias_(bias) { std::fill_n(partial_, K, bias); }

  // taps[e * K + k] belongs to input k and to the output e steps before the newest.
  template <class Tap>
  inline Vector<A> step(const Vector<A>* inputs, const Tap* taps) {
    for (Index e = 0; e < K; ++e) {
      Vector<A> part = taps[e * K] * inputs[0];
      for (Index k = 1; k < K; ++k) part += taps[e * K + k] * inputs[k];
      partial_[e] += part;
    }
    const Vector<A> done = partial_[K - 1];
    for (Index e = K - 1; e > 0; --e) partial_[e] = partial_[e - 1];
    partial_[0] = bias_;
    return done;
  }

 private:
  Vector<A> bias_, partial_[K];
};

template <class A>
struct PlaneCoefficients {
  A center, scale, bias;
};

// Calls coefficients_of(n, c) for each plane, right before its values are read.
template <int K, class T, class Function, class A = Arithmetic<T>>
void convolve_planes(const ConvolveArguments<T>& o, Function coefficients_of) {
  constexpr Index L = LANES<A>, R = K / 2, TAPS = K * K;
  const Index pitch = o.w + 2 * R, most = std::clamp<Index>(STRIP / pitch, 1, o.h), size = o.h * o.w;
  const Index all = o.n * o.c * size;
  const T* const end = o.input + all;
#pragma omp parallel num_threads(o.threads) if (o.threads > 1)
  {
    std::vector<A> u((most + 2 * R) * pitch + 2 * L);
#pragma omp for schedule(static)
    for (Index p = 0; p < o.n * o.c; ++p) {
      const Index n = p / o.c, c = p % o.c, start = p * size;
      const PlaneCoefficients<A> own = coefficients_of(n, c);
      const A center = own.center, scale = own.scale;
      const A slope = at(o.slope, o.slope_step, n, c), other_center = at(o.other_center, o.c, n, c);
      const Vector<A> bias = Vector<A>{} + own.bias;
      A taps[TAPS];
      for (Index t = 0; t < TAPS; ++t) taps[t] = scale * o.kernel[c * TAPS + (o.turned ? TAPS - 1 - t : t)];
      for (Index first = 0; first < o.h; first += most) {
        const Index rows = std::min(most, o.h - first);
        fill_rows<K>(u.data(), o.input + start, end, center, first, rows, o.h, o.w, [&](Index place) {
          __builtin_prefetch(o.output + start + place, 1);
          if (o.other) __builtin_prefetch(o.other + start + place);
        });
        for (Index next = 0; next < o.w; next += L) {
          const Index j = last_start(next, o.w, L);
          const A* column = u.data() + j;
          Slide<K, A> slide(bias);
          for (Index i = -2 * R; i < rows; ++i, column += pitch) {
            Vector<A> inputs[K];
            for (Index k = 0; k < K; ++k) inputs[k] = load(column + k);
            Vector<A> total = slide.step(inputs, taps);
            if (i < 0) continue;
            const Index place = (first + i) * o.w + j, left = size - place;
            if (o.other) total += slope * (load(o.other + start + place, all - start - place) - other_center);
            store(o.output + start + place, total, left);  // what goes beyond the row is overwritten by the next
          }
        }
      }
    }
  }
}

template <int K, class T, class A = Arithmetic<T>>
void convolve_pixels(const ConvolveArguments<T>& o) {
  constexpr Index L = LANES<A>, R = K / 2, TAPS = K * K, BLOCKS = GROUP / L;
  const Index groups = ceil_div(o.c, GROUP), parts = ceil_div(o.h, ROWS), pitch = (o.w + 2 * R) * L;
#pragma omp parallel num_threads(o.threads) if (o.threads > 1)
  {
    Window<K, T> window(o.w);
    std::vector<A> others(o.other ? o.w * GROUP : 0);
#pragma omp for schedule(static)
    for (Index task = 0; task < o.n * parts * groups; ++task) {
      const Index group = task % groups, part = task / groups % parts, n = task / groups / parts;
      const Index first = group * GROUP, channels = std::min(GROUP, o.c - first), blocks = ceil_div(channels, L);
      Vector<A> taps[BLOCKS][TAPS] = {}, center[BLOCKS] = {}, bias[BLOCKS] = {}, slope[BLOCKS] = {}, a[BLOCKS] = {};
      for (Index k = 0; k < channels; ++k) {
        const Index b = k / L, lane = k % L, c = first + k;
        const A scale = at(o.scale, o.scale_step, n, c);
        // Column by column: the line of the Slide is a row.
        for (Index t = 0; t < TAPS; ++t)
          taps[b][t % K * K + t / K][lane] = scale * o.kernel[c * TAPS + (o.turned ? TAPS - 1 - t : t)];
        center[b][lane] = at(o.center, o.center_step, n, c);
        bias[b][lane] = at(o.bias, o.bias_step, n, c);
        slope[b][lane] = at(o.slope, o.slope_step, n, c);
        a[b][lane] = at(o.other_center, o.c, n, c);
      }
      const Index offset = n * o.h * o.w * o.c, stop = std::min(o.h, (part + 1) * ROWS);
      window.start(o.input + offset, center, part * ROWS, first, channels, o.c, o.h, o.w);
      for (Index i = part * ROWS; i < stop; ++i) {
        window.move_to(o.input + offset, center, i, first, channels, o.c, o.h, o.w);
        if (o.other) fill_pixels<0>(others.data(), o.other + offset, a, i, first, channels, o.c, o.h, o.w);
        T* const out = o.output + offset + i * o.w * o.c + first;
        for (Index j = 0; j < o.w; ++j)
          for (Index b = 0; b < blocks; ++b) __builtin_prefetch(out + j * o.c + b * L, 1);
        for (Index b = 0; b < blocks; ++b) {
          Slide<K, A> slide(bias[b]);
          for (Index j = -2 * R; j < o.w; ++j) {
            Vector<A> inputs[K];
            for (Index d = 0; d < K; ++d) inputs[d] = load(window.rows[d] + b * pitch + (j + 2 * R) * L);
            Vector<A> total = slide.step(inputs, taps[b]);
            if (j < 0) continue;
            if (o.other) total += slope[b] * load(others.data() + (b * o.w + j) * L);
            store(out + j * o.c + b * L, total, channels - b * L);
          }
        }
      }
    }
  }
}

template <class T>
void convolve(const ConvolveArguments<T>& o) {
  using A = Arithmetic<T>;
  const auto coefficients_of = [&](Index n, Index c) {
    return PlaneCoefficients<A>{
        at(o.center, o.center_step, n, c), at(o.scale, o.scale_step, n, c), at(o.bias, o.bias_step, n, c)};
  };
  with_kernel_size(o.kernel_size, [&](auto k) {
    constexpr int K = decltype(k)::value;
    o.channels_last ? convolve_pixels<K>(o) : convolve_planes<K>(o, coefficients_of);
  });
}

}  // namespace
