// What Python passes: one struct for each function of the library.
//
// mmubn/ops/cpp/boundary.py declares the same fields in the same order, and checks the tensors before it takes their
// addresses. T is the type in memory, Arithmetic<T> the type computed in. A pointer may be null only where its comment
// says so. For an array of (N or 1, C), center_step and the like are the number of values from one sample to the next:
// C, or 0 where all samples share one row.

#pragma once

#include "vectors.h"

namespace {

template <class T>
struct MomentsArguments {
  using A = Arithmetic<T>;
  const T* x;  // (N, C, pixels)
  A* a;        // (N, C)
  A* v;        // (N, C), or null: the means alone
  Index n, c, pixels, threads;
  bool channels_last;
};

template <class T>
struct SimilarityArguments {
  using A = Arithmetic<T>;
  const T* x;      // (N, C, pixels), in either memory format
  const A *a, *v;  // (N, C)
  A* total;        // one value
  Index n, c, pixels;
  Index samples;  // the first of the N: those that are compared
  Index threads;
};

// output = scale conv(input - center; kernel) + bias + slope (other - other_center).
// The forward: input = x. The gradient of x: input = dy, the kernel turned by half a turn, other = x.
template <class T>
struct ConvolveArguments {
  using A = Arithmetic<T>;
  const T* input;         // (N, C, H, W)
  const T* other;         // (N, C, H, W), or null: 0
  T* output;              // (N, C, H, W)
  const A* kernel;        // (C, k * k)
  const A* center;        // (N or 1, C), or null: 0
  const A* scale;         // (N or 1, C)
  const A* bias;          // (N or 1, C), or null: 0
  const A* other_center;  // (N, C), or null without `other`
  const A* slope;         // (N or 1, C), or null without `other`
  Index center_step, scale_step, bias_step, slope_step;
  Index n, c, h, w, kernel_size, threads;
  bool turned, channels_last;
};

// products_t = sum_p (x(p + t) - center) dy(p) and sums_t = sum_p dy(p), over the places p from which tap t looks at
// the map.
template <class T>
struct TapSumsArguments {
  using A = Arithmetic<T>;
  const T *x, *dy;     // (N, C, H, W)
  const A* center;     // (N or 1, C)
  A *products, *sums;  // (N, k * k, C)
  Index center_step;
  Index n, c, h, w, kernel_size, threads;
  bool channels_last;
};

// output = conv(r (x + s); kernel) + bias, where s = shift + center_weight a, a the mean of x over its pixels, and
// r = sigmoid(scale_weight (a + s) + scale_bias), which multiplies the bias too where it is calibrated.
template <class T>
struct EvaluateArguments {
  using A = Arithmetic<T>;
  const T* x;                          // (N, C, H, W)
  T* output;                           // (N, C, H, W)
  const A* kernel;                     // (C, k * k)
  const A* shift;                      // (C,)
  const A* center_weight;              // (C,), or null: 0
  const A *scale_weight, *scale_bias;  // (C,), or both null: r = 1
  const A* bias;                       // (C,)
  Index n, c, h, w, kernel_size, threads;
  bool calibrate_bias, channels_last;
};

template <class A>
struct StatisticsArguments {
  const A *a, *v;                       // (N, C)
  const A* center_weight;               // (C,), or null: 0
  const A *running_mean, *running_var;  // (C,)
  const bool* condensed;                // one value
  A *mean, *var, *new_mean, *new_var;   // (C,)
  double momentum;
  Index num_values;                     // of each channel of the batch
  Index n, c;
};

template <class A>
struct CoefficientsArguments {
  const A* a;                          // (N, C)
  const A *mean, *var;                 // (C,)
  const A* center_weight;              // (C,), or null: 0
  const A *scale_weight, *scale_bias;  // (C,), or null without `logit`
  A* center;                           // (N, C)
  A* inv_std;                          // (C,)
  A* logit;                            // (N, C), or null without scaling
  double eps;
  Index n, c;
  bool rectified;
};

template <class A>
struct CoefficientsBackwardArguments {
  const A *products, *sums;          // (N, taps, C)
  const A* a;                        // (N, C), or null where nothing depends on the instance means
  const A *mean, *var;               // (C,)
  const bool* condensed;             // one value, or null without `slope`
  const A* kernel;                   // (C, taps)
  const A *center, *scale;           // (N or 1, C)
  const A* r;                        // (N, C), or null without scaling
  const A* calibrated_bias;          // (C,), or null where r does not multiply the bias
  const A* center_weight;            // (C,), or null without centering
  const A* scale_weight;             // (C,), or null without `r`
  A* slope;                          // (C,), or null where the statistics do not depend on x
  A* offset;                         // (N, C), or null where it is 0
  A* d_taps;                         // (taps, C)
  A* d_bias;                         // (C,)
  A* d_center_weight;                // (C,), or null without `center_weight`
  A *d_scale_weight, *d_scale_bias;  // (C,), or null without `r`
  Index center_step, scale_step;
  double eps;
  double num_values;                 // of each channel of the batch
  Index n, c, taps, pixels, threads;
  bool rectified;
};

}  // namespace
