// Vectors of 64 bytes, and the types in memory and in arithmetic.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

// All headers are of one translation unit, kernels.cpp: with internal linkage the compiler inlines as it likes.
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

constexpr Index GROUP = 128;  // channels at a time, for channels-last

// The value of sample n and channel c of an (N, C) array, or of a (C,) one with step 0; 0 where there is no array.
template <class A>
inline A at(const A* values, Index step, Index n, Index c) {
  return values ? values[n * step + c] : A(0);
}

}  // namespace
