// Mean and variance of each channel of each sample: functional.instance_moments.

#pragma once

#include "arguments.h"

namespace {

// Mean and sum of squared deviations of N channels whose values are seen in pieces (Chan, Golub and LeVeque 1979).
template <Index N>
struct Moments {
  double mean[N] = {}, squares[N] = {}, total[N] = {};
  Index count = 0;

  void merge(const Moments& other) {
    const double all = double(count + other.count), share = other.count / all, weight = count * share;
    for (Index k = 0; k < N; ++k) {
      const double delta = other.mean[k] - mean[k];
      mean[k] += delta * share;
      squares[k] += other.squares[k] + delta * delta * weight;
      total[k] += other.total[k];
    }
    count += other.count;
  }
  // A piece of which deviations d = x - guess are known: the sums of d and d^2.
  template <class A>
  void merge(const A* guess, const A* deviations, const A* deviations_squared, Index number) {
    Moments piece;
    piece.count = number;
    for (Index k = 0; k < N; ++k) {
      const double deviation = double(deviations[k]) / number;
      piece.mean[k] = guess[k] + deviation;
      piece.squares[k] = deviations_squared[k] - deviation * deviations[k];
      piece.total[k] = double(guess[k]) * number;
    }
    merge(piece);
  }
  // Where a value is not finite: the mean is what a plain sum gives, the variance NaN.
  double mean_of(Index k) const { return std::isfinite(total[k]) ? mean[k] : total[k] / count; }
  double variance_of(Index k) const { return std::isfinite(total[k]) ? squares[k] / count : NAN; }
};

constexpr Index PIECE = 4096;  // values of a plane at a time: they are read twice, the second time from the cache

template <class T, bool SQUARES, class A = Arithmetic<T>>
inline void plane_sums(const T* x, Index count, A guess, A& deviations, A& squares) {
  constexpr Index L = LANES<A>;
  Vector<A> d[4] = {}, q[4] = {};
  Index i = 0;
  for (; i + 4 * L <= count; i += 4 * L)
    for (Index k = 0; k < 4; ++k) {
      const Vector<A> value = load(x + i + k * L) - guess;
      d[k] += value;
      if (SQUARES) q[k] += value * value;
    }
  for (; i + L <= count; i += L) {
    const Vector<A> value = load(x + i) - guess;
    d[0] += value;
    if (SQUARES) q[0] += value * value;
  }
  A rest = 0, rest_squares = 0;
  for (; i < count; ++i) {
    const A value = widen(x[i]) - guess;
    rest += value;
    rest_squares += value * value;
  }
  deviations = sum<A>((d[0] + d[1]) + (d[2] + d[3])) + rest;
  if (SQUARES) squares = sum<A>((q[0] + q[1]) + (q[2] + q[3])) + rest_squares;
}

template <class T, class A = Arithmetic<T>>
inline A mean_of_plane(const T* x, Index pixels) {
  double total = 0;
  for (Index start = 0; start < pixels; start += PIECE) {
    A plain, squares;
    plane_sums<T, false>(x + start, std::min(PIECE, pixels - start), A(0), plain, squares);
    total += plain;
  }
  return A(total / pixels);
}

template <class T, class A = Arithmetic<T>>
void moments_of_planes(const MomentsArguments<T>& o) {
  const Index planes = o.n * o.c;
#pragma omp parallel for num_threads(o.threads) if (o.threads > 1) schedule(static)
  for (Index p = 0; p < planes; ++p) {
    if (!o.v) {
      o.a[p] = mean_of_plane(o.x + p * o.pixels, o.pixels);
      continue;
    }
    Moments<1> moments;
    for (Index start = 0; start < o.pixels; start += PIECE) {
      const Index count = std::min(PIECE, o.pixels - start);
      const T* const piece = o.x + p * o.pixels + start;
      A plain, deviations, squares;
      plane_sums<T, false>(piece, count, A(0), plain, squares);
      const A guess = plain / count;
      plane_sums<T, true>(piece, count, guess, deviations, squares);
      moments.merge(&guess, &deviations, &squares, count);
    }
    o.a[p] = A(moments.mean_of(0));
    o.v[p] = A(moments.variance_of(0));
  }
}

constexpr Index PART = 4096;  // pixels of one task
constexpr Index CHUNK = 128;  // pixels at a time: GROUP * CHUNK values stay in the cache

template <class T, class A = Arithmetic<T>>
void moments_of_pixels(const MomentsArguments<T>& o) {
  constexpr Index L = LANES<A>, BLOCKS = GROUP / L;
  const Index groups = ceil_div(o.c, GROUP), parts = ceil_div(o.pixels, PART);
  std::vector<Moments<GROUP>> all(o.n * groups * parts);
#pragma omp parallel num_threads(o.threads) if (o.threads > 1)
  {
#pragma omp for schedule(static)
    for (Index task = 0; task < o.n * groups * parts; ++task) {
      const Index part = task % parts, group = task / parts % groups, sample = task / parts / groups;
      const Index first = group * GROUP, channels = std::min(GROUP, o.c - first), blocks = ceil_div(channels, L);
      const Index stop = std::min(o.pixels, (part + 1) * PART);
      for (Index start = part * PART; start < stop; start += CHUNK) {
        const Index count = std::min(CHUNK, stop - start);
        const T* const chunk = o.x + (sample * o.pixels + start) * o.c + first;
        Vector<A> guess[BLOCKS] = {}, d[BLOCKS] = {}, q[BLOCKS] = {};
        for (Index j = 0; j < count; ++j)
          for (Index b = 0; b < blocks; ++b) guess[b] += load(chunk + j * o.c + b * L, channels - b * L);
        for (Index b = 0; b < blocks; ++b) guess[b] /= A(count);
        if (o.v)
          for (Index j = 0; j < count; ++j)
            for (Index b = 0; b < blocks; ++b) {
              const Vector<A> value = load(chunk + j * o.c + b * L, channels - b * L) - guess[b];
              d[b] += value;
              q[b] += value * value;
            }
        A lanes[3][GROUP];
        std::memcpy(lanes[0], guess, sizeof guess);
        std::memcpy(lanes[1], d, sizeof d);
        std::memcpy(lanes[2], q, sizeof q);
        all[task].merge(lanes[0], lanes[1], lanes[2], count);
      }
    }
#pragma omp for schedule(static)
    for (Index task = 0; task < o.n * groups; ++task) {
      Moments<GROUP>& moments = all[task * parts];
      for (Index part = 1; part < parts; ++part) moments.merge(all[task * parts + part]);
      const Index first = task % groups * GROUP, start = task / groups * o.c + first;
      for (Index k = 0; k < std::min(GROUP, o.c - first); ++k) {
        o.a[start + k] = A(moments.mean_of(k));
        if (o.v) o.v[start + k] = A(moments.variance_of(k));
      }
    }
  }
}

template <class T>
void moments(const MomentsArguments<T>& o) {
  o.channels_last ? moments_of_pixels(o) : moments_of_planes(o);
}

}  // namespace
