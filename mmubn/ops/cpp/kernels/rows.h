// The pieces of x that a convolution reads, in buffers that stay in the cache, with zeros around them for the padding.

#pragma once

#include "vectors.h"

namespace {

// Rows first - K / 2 to first + rows + K / 2 of a plane, less `center`, one after the other with zeros around them:
// place (i, j) of the plane is at buffer[(i - first + K / 2) (w + 2 (K / 2)) + K / 2 + j].
// Whole vectors are read and written: what goes beyond a row is overwritten, and nothing is read beyond `end`.
// Calls prefetch(place) for what else will be needed: the caller goes down columns, which is no order to read memory.
template <int K, class T, class A, class Prefetch>
inline void fill_rows(
    A* buffer, const T* plane, const T* end, A center, Index first, Index rows, Index h, Index w, Prefetch prefetch) {
  constexpr Index L = LANES<A>, R = K / 2;
  std::fill_n(buffer, R, A(0));
  A* row = buffer + R;
  for (Index i = first - R; i < first + rows + R; ++i, row += w + 2 * R) {
    if (i < 0 || i >= h) {
      std::fill_n(row, w, A(0));
    } else {
      const T* const source = plane + i * w;
      for (Index j = 0; j < w; j += L) {
        store(row + j, load(source + j, end - source - j) - center);
        prefetch(i * w + j);
      }
    }
    for (Index j = 0; j < 2 * R; ++j) row[w + j] = 0;
  }
  std::fill_n(row, L, A(0));
}

constexpr Index STRIP = 3072;  // values of a plane in the buffer at a time
constexpr Index ROWS = 32;     // rows of a map in channels-last for one task

// One row of a map in channels-last, channels [first, first + channels), as blocks of pixels of L channels each, less
// center: buffer[block][R + j][lane], with zeros around the row. A row outside the map is all zeros.
template <int R, class T, class A>
inline void fill_pixels(
    A* buffer, const T* map, const Vector<A>* center, Index i, Index first, Index channels, Index c, Index h, Index w) {
  constexpr Index L = LANES<A>;
  const Index pitch = (w + 2 * R) * L, blocks = ceil_div(channels, L);
  if (i < 0 || i >= h) {
    std::fill_n(buffer, blocks * pitch, A(0));
    return;
  }
  for (Index b = 0; b < blocks; ++b) {
    std::fill_n(buffer + b * pitch, R * L, A(0));
    std::fill_n(buffer + b * pitch + (R + w) * L, R * L, A(0));
  }
  for (Index j = 0; j < w; ++j) {
    const T* const pixel = map + (i * w + j) * c + first;
    for (Index b = 0; b < blocks; ++b)
      store(buffer + b * pitch + (R + j) * L, load(pixel + b * L, channels - b * L) - center[b]);
  }
}

// K rows around the one at hand: rows[d] is row i + d - K / 2, filled when it first comes into view.
template <int K, class T, class A = Arithmetic<T>>
class Window {
 public:
  Window(Index w) : length_((w + K - 1) * GROUP), buffer_(K * length_) {}

  void start(const T* map, const Vector<A>* center, Index i, Index first, Index channels, Index c, Index h, Index w) {
    for (Index d = 0; d < K; ++d) {
      rows[d] = buffer_.data() + d * length_;
      if (d > 0) fill_pixels<K / 2>(rows[d], map, center, i + d - 1 - K / 2, first, channels, c, h, w);
    }
  }
  void move_to(const T* map, const Vector<A>* center, Index i, Index first, Index channels, Index c, Index h, Index w) {
    std::rotate(rows, rows + 1, rows + K);
    fill_pixels<K / 2>(rows[K - 1], map, center, i + K / 2, first, channels, c, h, w);
  }

  A* rows[K];

 private:
  Index length_;
  std::vector<A> buffer_;
};

// Calls function(k) with the size of the kernel as a constant, decltype(k)::value.
template <class Function>
void with_kernel_size(Index kernel_size, Function function) {
  switch (kernel_size) {
    case 1: return function(std::integral_constant<int, 1>());
    case 3: return function(std::integral_constant<int, 3>());
    case 5: return function(std::integral_constant<int, 5>());
    case 7: return function(std::integral_constant<int, 7>());
  }
}

}  // namespace
