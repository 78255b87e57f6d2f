// The passes over x, and the small functions between them, for the CPU. Called by mmubn/kernels/cpp_ops.py.
//
// Names and equations are those of mmubn/kernels/torch_ops.py and autograd.py. x is (N, C, H, W), dense, in one of two
// memory formats: "planes" (NCHW: a channel of a sample is one plane of H*W values) or "pixels" (channels-last: the C
// values of a place lie side by side). T is the type in memory, A the type computed in: float for BFloat16.
//
// Each pass reads a piece into a buffer that stays in the cache, subtracts the centre there, and surrounds it with the
// zeros of the padding; what follows are long loops over whole vectors. How the work is cut does not depend on the
// number of threads, so neither do the results.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using Index = std::int64_t;

struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct ArithmeticOf {
  using Type = T;
};
template <>
struct ArithmeticOf<BFloat16> {
  using Type = float;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::Type;

// ---------------------------------------------------------------------------------------------- vectors of 64 bytes

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(64)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(64)));
};
template <class A>
using Vector = typename VectorOf<A>::Type;
typedef std::uint16_t Halves __attribute__((vector_size(32)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
template <class A>
constexpr Index LANES = 64 / sizeof(A);

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class A>
inline Vector<A> load(const A* p) {
  Vector<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vector<float> load(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector<float> v;
  std::memcpy(&v, &words, sizeof v);
  return v;
}
template <class A>
inline void store(A* p, const Vector<A>& v) {
  std::memcpy(p, &v, sizeof v);
}
inline void store(BFloat16* p, const Vector<float>& v) {  // to nearest, ties to even
  Words words;
  std::memcpy(&words, &v, sizeof words);
  const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector(v != v ? Words{} + 0x7fc0 : rounded, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

// The first `count` lanes; the others are 0, or not written.
template <class T>
inline Vector<Arithmetic<T>> load(const T* p, Index count) {
  if (count >= LANES<Arithmetic<T>>) return load(p);
  T lanes[LANES<Arithmetic<T>>] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, const Vector<Arithmetic<T>>& v, Index count) {
  if (count >= LANES<Arithmetic<T>>) return store(p, v);
  T lanes[LANES<Arithmetic<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

template <class A>
inline A sum(const Vector<A>& v) {
  typedef A Half __attribute__((vector_size(32)));
  typedef A Quarter __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  halves[0] += halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, halves, sizeof quarters);
  quarters[0] += quarters[1];
  A total = quarters[0][0];
  for (Index i = 1; i < LANES<A> / 4; ++i) total += quarters[0][i];
  return total;
}

template <class A>
using Mask = decltype(Vector<A>{} < Vector<A>{});

template <class A>
inline Mask<A> lanes_between(Index first, Index stop) {
  Mask<A> mask;
  for (Index i = 0; i < LANES<A>; ++i) mask[i] = first <= i && i < stop ? -1 : 0;
  return mask;
}

// Where the vector of a row of `length` begins that covers it from `next`: the last one ends where the row does.
inline Index last_start(Index next, Index length, Index lanes) {
  return std::min(next, std::max<Index>(length - lanes, 0));
}

inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// The value of sample n and channel c of an (N, C) array, or of a (C,) one with step 0; 0 where there is no array.
template <class A>
inline A at(const A* values, Index step, Index n, Index c) {
  return values ? values[n * step + c] : A(0);
}

// ------------------------------------------------------------------------------------------------------- the moments

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
void moments_of_planes(const T* x, A* a, A* v, Index planes, Index size, Index threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (Index p = 0; p < planes; ++p) {
    Moments<1> moments;
    double total = 0;
    for (Index start = 0; start < size; start += PIECE) {
      const Index count = std::min(PIECE, size - start);
      const T* const piece = x + p * size + start;
      A plain, deviations, squares;
      plane_sums<T, false>(piece, count, A(0), plain, squares);
      total += plain;
      if (!v) continue;
      const A guess = plain / count;
      plane_sums<T, true>(piece, count, guess, deviations, squares);
      moments.merge(&guess, &deviations, &squares, count);
    }
    a[p] = v ? A(moments.mean_of(0)) : A(total / size);
    if (v) v[p] = A(moments.variance_of(0));
  }
}

constexpr Index GROUP = 128;   // channels at a time, for channels-last
constexpr Index PART = 4096;   // pixels of one task of the moments
constexpr Index CHUNK = 128;   // pixels at a time: GROUP * CHUNK values stay in the cache

template <class T, class A = Arithmetic<T>>
void moments_of_pixels(const T* x, A* a, A* v, Index n, Index c, Index size, Index threads) {
  constexpr Index L = LANES<A>, BLOCKS = GROUP / L;
  const Index groups = ceil_div(c, GROUP), parts = ceil_div(size, PART);
  std::vector<Moments<GROUP>> all(n * groups * parts);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (Index task = 0; task < n * groups * parts; ++task) {
      const Index part = task % parts, group = task / parts % groups, sample = task / parts / groups;
      const Index first = group * GROUP, channels = std::min(GROUP, c - first), blocks = ceil_div(channels, L);
      const Index stop = std::min(size, (part + 1) * PART);
      for (Index start = part * PART; start < stop; start += CHUNK) {
        const Index count = std::min(CHUNK, stop - start);
        const T* const chunk = x + (sample * size + start) * c + first;
        Vector<A> guess[BLOCKS] = {}, d[BLOCKS] = {}, q[BLOCKS] = {};
        for (Index j = 0; j < count; ++j)
          for (Index b = 0; b < blocks; ++b) guess[b] += load(chunk + j * c + b * L, channels - b * L);
        for (Index b = 0; b < blocks; ++b) guess[b] /= A(count);
        if (v)
          for (Index j = 0; j < count; ++j)
            for (Index b = 0; b < blocks; ++b) {
              const Vector<A> value = load(chunk + j * c + b * L, channels - b * L) - guess[b];
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
    for (Index task = 0; task < n * groups; ++task) {
      Moments<GROUP>& moments = all[task * parts];
      for (Index part = 1; part < parts; ++part) moments.merge(all[task * parts + part]);
      const Index first = task % groups * GROUP, start = task / groups * c + first;
      for (Index k = 0; k < std::min(GROUP, c - first); ++k) {
        a[start + k] = A(moments.mean_of(k));
        if (v) v[start + k] = A(moments.variance_of(k));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- the similarity

constexpr Index COLUMNS = 4096;  // values of each sample at a time

// sum_{i != j} u_i . u_j = sum_d ((sum_n u_nd)^2 - sum_n u_nd^2), with u_n = f_n / ||f_n|| and ||f_n||^2 from the
// moments.
template <class T, class A = Arithmetic<T>>
double similarity(const T* x, const A* a, const A* v, Index n, Index c, Index size, Index threads) {
  constexpr Index L = LANES<A>;
  const Index length = c * size, parts = ceil_div(length, COLUMNS);
  std::vector<A> inverse(n);
  double not_finite = 0;
  for (Index i = 0; i < n; ++i) {
    double squares = 0;
    for (Index k = 0; k < c; ++k) squares += double(v[i * c + k]) + double(a[i * c + k]) * a[i * c + k];
    squares *= size;
    if (squares > std::numeric_limits<A>::max()) squares = INFINITY;  // as in A
    not_finite += 0 * squares;
    inverse[i] = squares > 0 ? A(1 / std::sqrt(squares)) : A(0);  // a sample of zeros is similar to none
  }
  std::vector<double> totals(parts);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (Index part = 0; part < parts; ++part) {
    const Index start = part * COLUMNS, stop = std::min(length, start + COLUMNS);
    Vector<A> total{};
    for (Index i = start; i < stop; i += L) {
      Vector<A> both{}, squares{};
      for (Index k = 0; k < n; ++k) {
        const Vector<A> u = load(x + k * length + i, stop - i) * inverse[k];
        both += u;
        squares += u * u;
      }
      total += both * both - squares;
    }
    totals[part] = sum<A>(total);
  }
  double total = not_finite;
  for (const double part : totals) total += part;
  return total;
}

// --------------------------------------------------------------------------- the convolution, forwards and backwards

// out = scale conv(in - center; kernel) + bias + slope (other - other_center).
// The forward: in = x. The gradient of x: in = dy, the kernel turned by half a turn, other = x.
template <class T, class A = Arithmetic<T>>
struct Convolution {
  const T *in, *other;  // other may be null, and so may center, bias, other_center and slope: 0
  T* out;
  const A *kernel, *center, *scale, *bias, *other_center, *slope;  // kernel (C, K * K); the others by at()
  Index center_step, scale_step, bias_step, slope_step;
  Index n, c, h, w;
  bool turned;
};

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

template <int K, class T, class A = Arithmetic<T>>
void convolve_planes(const Convolution<T>& o, Index threads) {
  constexpr Index L = LANES<A>, R = K / 2, TAPS = K * K;
  const Index pitch = o.w + 2 * R, most = std::clamp<Index>(STRIP / pitch, 1, o.h), size = o.h * o.w;
  const Index all = o.n * o.c * size;
  const T* const end = o.in + all;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<A> u((most + 2 * R) * pitch + 2 * L);
#pragma omp for schedule(static)
    for (Index p = 0; p < o.n * o.c; ++p) {
      const Index n = p / o.c, c = p % o.c, start = p * size;
      const A center = at(o.center, o.center_step, n, c), scale = at(o.scale, o.scale_step, n, c);
      const A slope = at(o.slope, o.slope_step, n, c), other_center = at(o.other_center, o.c, n, c);
      const Vector<A> bias = Vector<A>{} + at(o.bias, o.bias_step, n, c);
      A taps[TAPS];
      for (Index t = 0; t < TAPS; ++t) taps[t] = scale * o.kernel[c * TAPS + (o.turned ? TAPS - 1 - t : t)];
      for (Index first = 0; first < o.h; first += most) {
        const Index rows = std::min(most, o.h - first);
        fill_rows<K>(u.data(), o.in + start, end, center, first, rows, o.h, o.w, [&](Index place) {
          __builtin_prefetch(o.out + start + place, 1);
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
            store(o.out + start + place, total, left);  // what goes beyond the row is overwritten by the next
          }
        }
      }
    }
  }
}

constexpr Index ROWS = 32;  // of a map, the rows of one task

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

template <int K, class T, class A = Arithmetic<T>>
void convolve_pixels(const Convolution<T>& o, Index threads) {
  constexpr Index L = LANES<A>, R = K / 2, TAPS = K * K, BLOCKS = GROUP / L;
  const Index groups = ceil_div(o.c, GROUP), parts = ceil_div(o.h, ROWS), pitch = (o.w + 2 * R) * L;
#pragma omp parallel num_threads(threads) if (threads > 1)
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
      window.start(o.in + offset, center, part * ROWS, first, channels, o.c, o.h, o.w);
      for (Index i = part * ROWS; i < stop; ++i) {
        window.move_to(o.in + offset, center, i, first, channels, o.c, o.h, o.w);
        if (o.other) fill_pixels<0>(others.data(), o.other + offset, a, i, first, channels, o.c, o.h, o.w);
        T* const out = o.out + offset + i * o.w * o.c + first;
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

// ------------------------------------------------------------------------------ the sums over H and W of the backward

// Sums of dy over all places, and over the rows and columns from which a tap looks over the edge. Of them, S_t.
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

// G_t = sum_p (x(p + t) - center) dy(p) and S_t = sum_p dy(p), over the places p from which tap t looks at the map.
template <class T, class A = Arithmetic<T>>
struct TapSums {
  const T *x, *dy;
  const A* center;
  Index center_step;
  A *g, *s;  // (N, K * K, C)
  Index n, c, h, w;
};

template <int K, class T, class A = Arithmetic<T>>
void tap_sums_of_planes(const TapSums<T>& o, Index threads) {
  constexpr Index L = LANES<A>, R = K / 2, TAPS = K * K;
  const Index pitch = o.w + 2 * R, most = std::clamp<Index>(STRIP / pitch, 1, o.h), size = o.h * o.w;
  const T *const end = o.x + o.n * o.c * size, *const dy_end = o.dy + o.n * o.c * size;
#pragma omp parallel num_threads(threads) if (threads > 1)
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
        o.g[(n * TAPS + t) * o.c + c] = A(g[t]);
        o.s[(n * TAPS + t) * o.c + c] = A(edges.tap(t));
      }
    }
  }
}

template <int K, class T, class A = Arithmetic<T>>
void tap_sums_of_pixels(const TapSums<T>& o, Index threads) {
  constexpr Index L = LANES<A>, R = K / 2, TAPS = K * K, BLOCKS = GROUP / L;
  struct Sums {
    Vector<A> g[TAPS] = {};
    EdgeSums<K, Vector<A>> edges;
  };
  const Index groups = ceil_div(o.c, GROUP), parts = ceil_div(o.h, ROWS), pitch = (o.w + 2 * R) * L;
  std::vector<Sums> all(o.n * parts * groups * BLOCKS);
#pragma omp parallel num_threads(threads) if (threads > 1)
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
          store(o.g + (n * TAPS + t) * o.c + c, sums.g[t], o.c - c);
          store(o.s + (n * TAPS + t) * o.c + c, sums.edges.tap(t), o.c - c);
        }
      }
  }
}

// ----------------------------------------------------------------------------------------- between the passes over x

constexpr Index BLOCK = 64;  // channels at a time

// As torch.lerp: exact at both ends.
template <class A>
inline A lerp(A start, A end, A weight) {
  return weight < A(0.5) ? start + weight * (end - start) : end - (end - start) * (1 - weight);
}

// functional.batch_statistics and functional.select_statistics.
template <class A>
void select_statistics(
    const A* a, const A* v, const A* center_weight, const A* running_mean, const A* running_var, bool condensed,
    double momentum, Index count, A* mean, A* var, A* new_mean, A* new_var, Index n, Index c) {
  const A unbias = A(double(count) / (count - 1 + (count <= 1))), m = A(momentum);
  for (Index first = 0; first < c; first += BLOCK) {
    const Index channels = std::min(BLOCK, c - first);
    A sums[BLOCK] = {}, variances[BLOCK] = {}, squares[BLOCK] = {};
    for (Index i = 0; i < n; ++i)
      for (Index k = 0; k < channels; ++k) {
        const A value = a[i * c + first + k];
        sums[k] += value + at(center_weight, 0, 0, first + k) * value;
        variances[k] += v[i * c + first + k];
      }
    for (Index k = 0; k < channels; ++k) sums[k] /= A(n);
    for (Index i = 0; i < n; ++i)
      for (Index k = 0; k < channels; ++k) {
        const A value = a[i * c + first + k];
        const A deviation = value + at(center_weight, 0, 0, first + k) * value - sums[k];
        squares[k] += deviation * deviation;
      }
    for (Index k = 0; k < channels; ++k) {
      const Index channel = first + k;
      const A batch = sums[k], spread = variances[k] / A(n) + squares[k] / A(n), unbiased = spread * unbias;
      const A old_mean = running_mean[channel], old_var = running_var[channel];
      const bool moves = condensed && std::isfinite(batch) && std::isfinite(unbiased);
      mean[channel] = condensed ? batch : old_mean;
      var[channel] = condensed ? spread : old_var;
      new_mean[channel] = moves ? lerp(old_mean, batch, m) : old_mean;
      new_var[channel] = moves ? lerp(old_var, unbiased, m) : old_var;
    }
  }
}

// functional.coefficients up to the sigmoid: center, 1 / sqrt(var + eps) and, where there is one, its argument.
template <class A>
void coefficients(
    const A* a, const A* mean, const A* var, double eps, bool rectified, const A* center_weight, const A* scale_weight,
    const A* scale_bias, A* center, A* inv_std, A* logit, Index n, Index c) {
  for (Index k = 0; k < c; ++k) inv_std[k] = 1 / std::sqrt(var[k] + A(eps));
  for (Index i = 0; i < n; ++i)
    for (Index k = 0; k < c; ++k) {
      const A value = a[i * c + k], subtracted = mean[k] - at(center_weight, 0, 0, k) * value;
      center[i * c + k] = subtracted;
      if (!logit) continue;
      const A pooled = rectified ? (value - subtracted) * inv_std[k] : value;
      logit[i * c + k] = scale_weight[k] * pooled + scale_bias[k];
    }
}

// autograd.coefficients_backward. d_taps is (T, C); slope (C,), null where the statistics do not depend on x.
template <class A>
void coefficients_backward(
    const A* g, const A* s, const A* a, const A* mean, const A* var, const bool* condensed, double count, double eps,
    bool rectified, const A* kernel, const A* center, Index center_step, const A* scale, Index scale_step, const A* r,
    const A* calibrated_bias, const A* center_weight, const A* scale_weight, A* slope, A* offset, A* d_taps, A* d_bias,
    A* d_center_weight, A* d_scale_weight, A* d_scale_bias, Index n, Index c, Index taps, Index size, Index threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (Index first = 0; first < c; first += BLOCK) {
    const Index channels = std::min(BLOCK, c - first);
    A inv_std[BLOCK], d_scale[BLOCK], turned[BLOCK];
    A bias[BLOCK] = {}, d_inv_std[BLOCK] = {}, d_weight[BLOCK] = {}, d_logits[BLOCK] = {}, d_mean[BLOCK] = {},
      d_centering[BLOCK] = {};
    for (Index k = 0; k < channels; ++k) inv_std[k] = 1 / std::sqrt(var[first + k] + A(eps));
    for (Index t = 0; t < taps; ++t) std::fill_n(d_taps + t * c + first, channels, A(0));
    for (Index i = 0; i < n; ++i) {
      std::fill_n(d_scale, channels, A(0));
      std::fill_n(turned, channels, A(0));
      for (Index t = 0; t < taps; ++t) {
        const A* const gt = g + (i * taps + t) * c + first;
        const A* const st = s + (i * taps + t) * c + first;
        for (Index k = 0; k < channels; ++k) {
          const A tap = kernel[(first + k) * taps + t];
          d_scale[k] += gt[k] * tap;
          turned[k] += st[k] * tap;
          d_taps[t * c + first + k] += scale[i * scale_step + first + k] * gt[k];
        }
      }
      for (Index k = 0; k < channels; ++k) {
        const Index channel = first + k;
        const A value = a ? a[i * c + channel] : A(0), deviation = value - center[i * center_step + channel];
        A d_center = -scale[i * scale_step + channel] * turned[k], d_a = 0;
        A db = s[(i * taps + taps / 2) * c + channel];
        if (r) {
          const A factor = r[i * c + channel];
          A d_r = d_scale[k] * inv_std[k];
          if (calibrated_bias) {
            d_r += db * calibrated_bias[channel];
            db *= factor;
          }
          d_inv_std[k] += d_scale[k] * factor;
          const A d_logit = d_r * factor * (1 - factor);
          d_weight[k] += d_logit * (rectified ? deviation * inv_std[k] : value);
          d_logits[k] += d_logit;
          d_a = d_logit * scale_weight[channel];
          if (rectified) {
            d_inv_std[k] += d_a * deviation;
            d_a *= inv_std[k];
            d_center -= d_a;
          }
        } else {
          d_inv_std[k] += d_scale[k];
        }
        bias[k] += db;
        d_mean[k] += d_center;
        if (center_weight) {
          d_centering[k] -= d_center * value;
          d_a -= center_weight[channel] * d_center;
        }
        if (offset) offset[i * c + channel] = d_a;
      }
    }
    if (slope) {
      const A share = *condensed ? A(size / count) : A(0);
      A d_var[BLOCK];
      for (Index k = 0; k < channels; ++k) {
        d_var[k] = A(-0.5) * d_inv_std[k] * inv_std[k] * inv_std[k] * inv_std[k];
        slope[first + k] = A(2) / A(size) * (share * d_var[k]);
      }
      for (Index i = 0; i < n; ++i)
        for (Index k = 0; k < channels; ++k) {
          const Index channel = first + k;
          const A gain = 1 + at(center_weight, 0, 0, channel), value = a[i * c + channel];
          const A d_m = share * (d_mean[k] + 2 * d_var[k] * (gain * value - mean[channel]));
          d_centering[k] += d_m * value;
          offset[i * c + channel] += gain * d_m;
        }
    }
    if (offset)
      for (Index i = 0; i < n; ++i)
        for (Index k = 0; k < channels; ++k) offset[i * c + first + k] /= A(size);
    std::copy_n(bias, channels, d_bias + first);
    if (center_weight) std::copy_n(d_centering, channels, d_center_weight + first);
    if (r) {
      std::copy_n(d_weight, channels, d_scale_weight + first);
      std::copy_n(d_logits, channels, d_scale_bias + first);
    }
  }
}

// Calls function(k) with the size of the kernel as a constant, decltype(k)::value.
template <class Function>
void with_size(Index size, Function function) {
  switch (size) {
    case 1: return function(std::integral_constant<int, 1>());
    case 3: return function(std::integral_constant<int, 3>());
    case 5: return function(std::integral_constant<int, 5>());
    case 7: return function(std::integral_constant<int, 7>());
  }
}

template <class T>
void convolve(const Convolution<T>& o, Index size, bool channels_last, Index threads) {
  with_size(size, [&](auto k) {
    channels_last ? convolve_pixels<decltype(k)::value>(o, threads) : convolve_planes<decltype(k)::value>(o, threads);
  });
}

template <class T>
void tap_sums(const TapSums<T>& o, Index size, bool channels_last, Index threads) {
  with_size(size, [&](auto k) {
    channels_last ? tap_sums_of_pixels<decltype(k)::value>(o, threads)
                  : tap_sums_of_planes<decltype(k)::value>(o, threads);
  });
}

}  // namespace

// ------------------------------------------------------------------------------------- the functions of the library

#define MMUBN_PASSES(NAME, T, A)                                                                                     \
  extern "C" void moments_##NAME(                                                                                    \
      const T* x, A* a, A* v, Index n, Index c, Index size, bool channels_last, Index threads) {                     \
    channels_last ? moments_of_pixels(x, a, v, n, c, size, threads)                                                  \
                  : moments_of_planes(x, a, v, n * c, size, threads);                                                \
  }                                                                                                                  \
  extern "C" void similarity_##NAME(                                                                                 \
      const T* x, const A* a, const A* v, A* out, Index n, Index c, Index size, Index threads) {                     \
    *out = A(similarity(x, a, v, n, c, size, threads));                                                              \
  }                                                                                                                  \
  extern "C" void convolve_##NAME(                                                                                   \
      const T* in, const T* other, T* out, const A* kernel, const A* center, const A* scale, const A* bias,          \
      const A* other_center, const A* slope, Index center_step, Index scale_step, Index bias_step, Index slope_step, \
      Index n, Index c, Index h, Index w, Index size, bool turned, bool channels_last, Index threads) {              \
    const Convolution<T> o{in, other, out, kernel, center, scale, bias, other_center, slope, center_step, scale_step, \
                           bias_step, slope_step, n, c, h, w, turned};                                               \
    convolve(o, size, channels_last, threads);                                                                       \
  }                                                                                                                  \
  extern "C" void tap_sums_##NAME(                                                                                   \
      const T* x, const T* dy, const A* center, Index center_step, A* g, A* s, Index n, Index c, Index h, Index w,   \
      Index size, bool channels_last, Index threads) {                                                               \
    tap_sums(TapSums<T>{x, dy, center, center_step, g, s, n, c, h, w}, size, channels_last, threads);                \
  }

MMUBN_PASSES(float32, float, float)
MMUBN_PASSES(float64, double, double)
MMUBN_PASSES(bfloat16, BFloat16, float)

#define MMUBN_SMALL(NAME, A)                                                                                         \
  extern "C" void statistics_##NAME(                                                                                 \
      const A* a, const A* v, const A* center_weight, const A* running_mean, const A* running_var,                   \
      const bool* condensed, double momentum, Index count, A* mean, A* var, A* new_mean, A* new_var, Index n,        \
      Index c) {                                                                                                     \
    select_statistics(a, v, center_weight, running_mean, running_var, *condensed, momentum, count, mean, var,        \
                      new_mean, new_var, n, c);                                                                      \
  }                                                                                                                  \
  extern "C" void coefficients_##NAME(                                                                               \
      const A* a, const A* mean, const A* var, double eps, bool rectified, const A* center_weight,                   \
      const A* scale_weight, const A* scale_bias, A* center, A* inv_std, A* logit, Index n, Index c) {               \
    coefficients(a, mean, var, eps, rectified, center_weight, scale_weight, scale_bias, center, inv_std, logit, n, c); \
  }                                                                                                                  \
  extern "C" void coefficients_backward_##NAME(                                                                      \
      const A* g, const A* s, const A* a, const A* mean, const A* var, const bool* condensed, double count,          \
      double eps, bool rectified, const A* kernel, const A* center, Index center_step, const A* scale,               \
      Index scale_step, const A* r, const A* calibrated_bias, const A* center_weight, const A* scale_weight,         \
      A* slope, A* offset, A* d_taps, A* d_bias, A* d_center_weight, A* d_scale_weight, A* d_scale_bias,             \
      Index n, Index c, Index taps, Index size, Index threads) {                                                     \
    coefficients_backward(g, s, a, mean, var, condensed, count, eps, rectified, kernel, center, center_step, scale,  \
                          scale_step, r, calibrated_bias, center_weight, scale_weight, slope, offset, d_taps, d_bias, \
                          d_center_weight, d_scale_weight, d_scale_bias, n, c, taps, size, threads);                 \
  }

MMUBN_SMALL(float32, float)
MMUBN_SMALL(float64, double)
