// The sums over H and W that all gradients follow from: types.TapSums.

#pragma once

#include "arguments.h"
#include "rows.h"

namespace {

// Sums of dy over all places, and over the rows and columns from which a tap looks over the edge. The sum over those
// from which a tap looks at the map follows from them.
template <int K, class V>
struct EdgeSums {
  static constexpr Index R = K / 2, ROOM = R > 0 ? R : 1;
  V total{}, top[ROOM] = {}, bottom[ROOM] = {}, left[ROOM] = {}, right[ROOM] = {};  // by their distance from the edge
  V corners[4][ROOM][ROOM] = {};  // top left, top right, bottom left, bottom right; [row][column]

  // The sum of dy over a row, and each value in the K / 2 columns beside an edge.
  void add_row(const V& sum, Index i, Index h) {
    total += sum;
    if constexpr (R == 0) return;
    if (i < R) top[i] += sum;
    if (h - 1 - i < R) bottom[h - 1 - i] += sum;
  }
  void add_edge(const V& value, Index i, Index j, Index h, Index w) {
    if constexpr (R == 0) return;
    if (j < R) left[j] += value;
    if (w - 1 - j < R) right[w - 1 - j] += value;
    const Index rows[2] = {i, h - 1 - i}, columns[2] = {j, w - 1 - j};
    for (Index k = 0; k < 4; ++k)
      if (rows[k / 2] < R && columns[k % 2] < R) corners[k][rows[k / 2]][columns[k % 2]] += value;
  }

  void add(const EdgeSums& other) {
    total += other.total;
    for (Index i = 0; i < R; ++i) {
      top[i] += other.top[i], bottom[i] += other.bottom[i], left[i] += other.left[i], right[i] += other.right[i];
      for (Index k = 0; k < 4; ++k)
        for (Index j = 0; j < R; ++j) corners[k][i][j] += other.corners[k][i][j];
    }
  }
  V tap(Index t) const {
    const Index di = t / K - R, dj = t % K - R;  // the tap looks at (i + di, j + dj)
    const Index rows = std::abs(di), columns = std::abs(dj);
    V result = total;
    for (Index i = 0; i < rows; ++i) result -= di < 0 ? top[i] : bottom[i];
    for (Index j = 0; j < columns; ++j) result -= dj < 0 ? left[j] : right[j];
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < columns; ++j) result += corners[(di > 0) * 2 + (dj > 0)][i][j];
    return result;
  }
};

template <int K, class T, class A = Arithmetic<T>>
void tap_sums_of_planes(const TapSumsArguments<T>& o) {
  constexpr Index L = LANES<A>, R = K / 2, TAPS = K * K;
  const Index pitch = o.w + 2 * R, most = std::clamp<Index>(STRIP / pitch, 1, o.h), size = o.h * o.w;
  const T *const end = o.x + o.n * o.c * size, *const dy_end = o.dy + o.n * o.c * size;
#pragma omp parallel num_threads(o.threads) if (o.threads > 1)
  {
    std::vector<A> u((most + 2 * R) * pitch + 2 * L);
#pragma omp for schedule(static)
    for (Index p = 0; p < o.n * o.c; ++p) {
      const Index n = p / o.c, c = p % o.c;
      const T* const map = o.dy + p * size;
      double g[TAPS] = {};
      EdgeSums<K, A> edges;
      for (Index first = 0; first < o.h; first += most) {
        const Index rows = std::min(most, o.h - first);
        const A center = at(o.center, o.center_step, n, c);
        fill_rows<K>(u.data(), o.x + p * size, end, center, first, rows, o.h, o.w, [&](Index place) {
          __builtin_prefetch(map + place);
        });
        Vector<A> total{}, sums[TAPS] = {};
        for (Index next = 0; next < o.w; next += L) {
          const Index j = last_start(next, o.w, L);
          const Mask<A> mask = lanes_between<A>(next - j, o.w - j);
          const A* column = u.data() + j;
          Vector<A> values[K] = {};  // of dy, in the K rows that the row of u has a part in, the newest first
          for (Index i = 0; i < rows + 2 * R; ++i, column += pitch) {
            for (Index d = K - 1; d > 0; --d) values[d] = values[d - 1];
            values[0] = Vector<A>{};
            if (i < rows) {
              const T* const row = map + (first + i) * o.w + j;
              values[0] = mask ? load(row, dy_end - row) : values[0];
            }
            total += values[0];
            for (Index k = 0; k < K; ++k) {
              const Vector<A> input = load(column + k);
              for (Index d = 0; d < K; ++d) sums[d * K + k] += values[d] * input;
            }
          }
        }
        for (Index t = 0; t < TAPS; ++t) g[t] += sum<A>(sums[t]);
        edges.total += sum<A>(total);
      }
      for (Index k = 0; k < R; ++k) {
        for (Index i = 0; i < o.h && k < o.w; ++i) {
          edges.left[k] += widen(map[i * o.w + k]);
          edges.right[k] += widen(map[(i + 1) * o.w - 1 - k]);
        }
        for (Index j = 0; j < o.w && k < o.h; ++j) {
          edges.top[k] += widen(map[k * o.w + j]);
          edges.bottom[k] += widen(map[(o.h - 1 - k) * o.w + j]);
        }
        for (Index j = 0; j < std::min(R, o.w) && k < o.h; ++j)
          for (Index corner = 0; corner < 4; ++corner)
            edges.corners[corner][k][j] =
                widen(map[(corner / 2 ? o.h - 1 - k : k) * o.w + (corner % 2 ? o.w - 1 - j : j)]);
      }
      for (Index t = 0; t < TAPS; ++t) {
        o.products[(n * TAPS + t) * o.c + c] = A(g[t]);
        o.sums[(n * TAPS + t) * o.c + c] = A(edges.tap(t));
      }
    }
  }
}

template <int K, class T, class A = Arithmetic<T>>
void tap_sums_of_pixels(const TapSumsArguments<T>& o) {
  constexpr Index L = LANES<A>, R = K / 2, TAPS = K * K, BLOCKS = GROUP / L;
  struct Sums {
    Vector<A> g[TAPS] = {};
    EdgeSums<K, Vector<A>> edges;
  };
  const Index groups = ceil_div(o.c, GROUP), parts = ceil_div(o.h, ROWS), pitch = (o.w + 2 * R) * L;
  std::vector<Sums> all(o.n * parts * groups * BLOCKS);
#pragma omp parallel num_threads(o.threads) if (o.threads > 1)
  {
    Window<K, T> window(o.w);
    std::vector<A> dy(o.w * GROUP);
    const Vector<A> zeros[BLOCKS] = {};
#pragma omp for schedule(static)
    for (Index task = 0; task < o.n * groups * parts; ++task) {
      const Index part = task % parts, group = task / parts % groups, n = task / parts / groups;
      const Index first = group * GROUP, channels = std::min(GROUP, o.c - first), blocks = ceil_div(channels, L);
      Vector<A> center[BLOCKS] = {};
      for (Index k = 0; k < channels; ++k) center[k / L][k % L] = at(o.center, o.center_step, n, first + k);
      const Index offset = n * o.h * o.w * o.c, stop = std::min(o.h, (part + 1) * ROWS);
      window.start(o.x + offset, center, part * ROWS, first, channels, o.c, o.h, o.w);
      for (Index i = part * ROWS; i < stop; ++i) {
        window.move_to(o.x + offset, center, i, first, channels, o.c, o.h, o.w);
        fill_pixels<0>(dy.data(), o.dy + offset, zeros, i, first, channels, o.c, o.h, o.w);
        for (Index b = 0; b < blocks; ++b) {
          Sums& sums = all[task * BLOCKS + b];
          const A* const row = dy.data() + b * o.w * L;
          Vector<A> total{}, g[TAPS] = {};
          Vector<A> values[K] = {};  // of dy, at the K places that a column of u has a part in, the newest first
          for (Index j = 0; j < o.w + 2 * R; ++j) {
            for (Index k = K - 1; k > 0; --k) values[k] = values[k - 1];
            values[0] = j < o.w ? load(row + j * L) : Vector<A>{};
            total += values[0];
            for (Index d = 0; d < K; ++d) {
              const Vector<A> input = load(window.rows[d] + b * pitch + j * L);
              for (Index k = 0; k < K; ++k) g[d * K + k] += values[k] * input;
            }
          }
          for (Index t = 0; t < TAPS; ++t) sums.g[t] += g[t];
          sums.edges.add_row(total, i, o.h);
          for (Index j = 0; j < std::min(R, o.w); ++j) sums.edges.add_edge(load(row + j * L), i, j, o.h, o.w);
          for (Index j = std::max(R, o.w - R); j < o.w; ++j) sums.edges.add_edge(load(row + j * L), i, j, o.h, o.w);
        }
      }
    }
#pragma omp for schedule(static)
    for (Index task = 0; task < o.n * groups; ++task)
      for (Index b = 0; b < BLOCKS; ++b) {
        const Index group = task % groups, n = task / groups, c = group * GROUP + b * L;
        if (c >= o.c) break;
        Sums sums;
        for (Index part = 0; part < parts; ++part) {
          const Sums& other = all[(task * parts + part) * BLOCKS + b];
          for (Index t = 0; t < TAPS; ++t) sums.g[t] += other.g[t];
          sums.edges.add(other.edges);
        }
        for (Index t = 0; t < TAPS; ++t) {
          store(o.products + (n * TAPS + t) * o.c + c, sums.g[t], o.c - c);
          store(o.sums + (n * TAPS + t) * o.c + c, sums.edges.tap(t), o.c - c);
        }
      }
  }
}

template <class T>
void tap_sums(const TapSumsArguments<T>& o) {
  with_kernel_size(o.kernel_size, [&](auto k) {
    o.channels_last ? tap_sums_of_pixels<decltype(k)::value>(o) : tap_sums_of_planes<decltype(k)::value>(o);
  });
}

}  // namespace
