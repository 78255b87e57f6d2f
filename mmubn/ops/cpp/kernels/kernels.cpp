// The kernels of the backend `cpp`: the passes over x, and the small (N, C) steps between them, for the CPU.
//
// Names and equations are those of mmubn/ops/types.py, mmubn/ops/backend.py and mmubn/functional.py. x is (N, C, H, W),
// dense, in one of two memory formats: "planes" (NCHW: a channel of a sample is one plane of H*W values) or "pixels"
// (channels-last: the C values of a place lie side by side). T is the type in memory, A the type computed in: float for
// BFloat16.
//
// Each pass reads a piece into a buffer that stays in the cache, subtracts the centre there, and surrounds it with the
// zeros of the padding; what follows are long loops over whole vectors. How the work is cut does not depend on the
// number of threads, so neither do the results.

#include "arguments.h"
#include "coefficients.h"
#include "convolution.h"
#include "evaluation.h"
#include "moments.h"
#include "similarity.h"
#include "tap_sums.h"

// The functions of the library: `name_dtype` takes the address of its struct. `name_size` is the size of that struct,
// the same for all dtypes: Python compares it with its own when it loads the library.
#define MMUBN_FUNCTION(NAME, ARGUMENTS, DTYPE, T)                                                         \
  extern "C" void NAME##_##DTYPE(const ARGUMENTS<T>* arguments) { NAME(*arguments); }                     \
  static_assert(sizeof(ARGUMENTS<T>) == sizeof(ARGUMENTS<float>), "the size depends on the type of values");

#define MMUBN_SIZE(NAME, ARGUMENTS) \
  extern "C" Index NAME##_size() { return sizeof(ARGUMENTS<float>); }

// Passes over x: they compute in another type than that in memory where that is BFloat16.
#define MMUBN_PASS(NAME, ARGUMENTS)                      \
  MMUBN_SIZE(NAME, ARGUMENTS)                            \
  MMUBN_FUNCTION(NAME, ARGUMENTS, float32, float)        \
  MMUBN_FUNCTION(NAME, ARGUMENTS, float64, double)       \
  MMUBN_FUNCTION(NAME, ARGUMENTS, bfloat16, BFloat16)

// Steps between them: in the statistics dtype.
#define MMUBN_STEP(NAME, ARGUMENTS)                      \
  MMUBN_SIZE(NAME, ARGUMENTS)                            \
  MMUBN_FUNCTION(NAME, ARGUMENTS, float32, float)        \
  MMUBN_FUNCTION(NAME, ARGUMENTS, float64, double)

MMUBN_PASS(moments, MomentsArguments)
MMUBN_PASS(similarity, SimilarityArguments)
MMUBN_PASS(convolve, ConvolveArguments)
MMUBN_PASS(tap_sums, TapSumsArguments)
MMUBN_PASS(evaluate, EvaluateArguments)
MMUBN_STEP(statistics, StatisticsArguments)
MMUBN_STEP(coefficients, CoefficientsArguments)
MMUBN_STEP(coefficients_backward, CoefficientsBackwardArguments)
