/* The coordinatewise LSTM on a CPU: a whole sequence, forward and backward.
 *
 * Plain C with a plain ABI, loaded by ctypes: no torch headers, no build-time dependency but a compiler. The kernels are
 * compiled once for each instruction set and chosen at run time.
 */
#include <stddef.h>
#include <stdint.h>

#define KERNEL "lstm_kernel.h"
#include "variants.h"

/* Arguments are described in lstm_kernel.h; returns 0, or 1 when out of memory. */
int learned_optim_lstm_sequence(int K, int64_t N, int F, int H, int L, const float *inputs, const float *hidden,
                                const float *cell, const uint8_t *active, const float *weights, float *top,
                                const float *d_top, float *d_weights, int threads) {
  return DISPATCH(lstm_sequence, K, N, F, H, L, inputs, hidden, cell, active, weights, top, d_top, d_weights, threads);
}
