/* The coordinatewise LSTM on a CPU: a whole sequence, forward and backward.
 *
 * Plain C with a plain ABI, loaded by ctypes: no torch headers, no build-time dependency but a compiler. The kernels are
 * compiled once for each instruction set and chosen at run time.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi"

#define LANES 4
#define SUFFIX _plain
#include "lstm_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86_VARIANTS

#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define LANES 8
#define SUFFIX _avx2
#include "lstm_kernel.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#define LANES 16
#define SUFFIX _avx512
#include "lstm_kernel.h"
#pragma GCC pop_options
#endif

#ifdef X86_VARIANTS
#define DISPATCH(function, ...)                                                                          \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? function##_avx512(__VA_ARGS__) \
   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")       ? function##_avx2(__VA_ARGS__)   \
                                                                           : function##_plain(__VA_ARGS__))
#else
#define DISPATCH(function, ...) function##_plain(__VA_ARGS__)
#endif

/* Arguments are described in lstm_kernel.h; returns 0, or 1 when out of memory. */
int learned_optim_lstm_sequence(int K, int64_t N, int F, int H, int L, const float *inputs, const float *hidden,
                                const float *cell, const uint8_t *active, const float *weights, float *top,
                                const float *d_top, float *d_weights, int threads) {
  return DISPATCH(lstm_sequence, K, N, F, H, L, inputs, hidden, cell, active, weights, top, d_top, d_weights, threads);
}
