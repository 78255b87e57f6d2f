// The sum of the cosine similarities of all pairs of samples: functional.similarity_sums.

#pragma once

#include "arguments.h"

namespace {

constexpr Index COLUMNS = 4096;  // values of each sample at a time

// sum_{i != j} u_i . u_j = sum_d ((sum_n u_nd)^2 - sum_n u_nd^2), with u_n = f_n / ||f_n|| and ||f_n||^2 from the
// moments.
template <class T, class A = Arithmetic<T>>
void similarity(const SimilarityArguments<T>& o) {
  constexpr Index L = LANES<A>;
  const Index length = o.c * o.pixels, parts = ceil_div(length, COLUMNS);
  std::vector<A> inverse(o.samples);
  double not_finite = 0;
  for (Index i = 0; i < o.samples; ++i) {
    double squares = 0;
    for (Index k = 0; k < o.c; ++k) {
      const A mean = o.a[i * o.c + k];
      squares += double(o.v[i * o.c + k]) + double(mean) * mean;
    }
    squares *= o.pixels;
    if (squares > std::numeric_limits<A>::max()) squares = INFINITY;  // as in A
    not_finite += 0 * squares;
    inverse[i] = squares > 0 ? A(1 / std::sqrt(squares)) : A(0);  // a sample of zeros is similar to none
  }
  std::vector<double> totals(parts);
#pragma omp parallel for num_threads(o.threads) if (o.threads > 1) schedule(static)
  for (Index part = 0; part < parts; ++part) {
    const Index start = part * COLUMNS, stop = std::min(length, start + COLUMNS);
    Vector<A> total{};
    for (Index i = start; i < stop; i += L) {
      Vector<A> both{}, squares{};
      for (Index k = 0; k < o.samples; ++k) {
        const Vector<A> u = load(o.x + k * length + i, stop - i) * inverse[k];
        both += u;
        squares += u * u;
      }
      total += both * both - squares;
    }
    totals[part] = sum<A>(total);
  }
  double total = not_finite;
  for (const double part : totals) total += part;
  *o.total = A(total);
}

}  // namespace
