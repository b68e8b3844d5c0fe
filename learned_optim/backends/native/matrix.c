/* The matrix stage on a CPU: from the updates of matrices to shaped ones, and into the parameters.
 *
 * rules/orthogonal.py defines the stage; this is the same chain of operations for matrices with a short side, one after the
 * other in scratch memory that stays in the caches. A matrix is shaped by one thread and every sum has a fixed order, so its
 * result depends neither on other matrices nor on the number of threads. See matrix_kernel.h for how it works.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

/* Matrices, one entry each. Mirrored by matrix.py. */
struct matrices {
  int64_t count;
  const int64_t *rows, *columns;
  float *const *updates;         /* contiguous; the shaped update is written over the update */
  const void *const *momenta[2]; /* their sum times `sign` is the raw momentum; either may be NULL */
  const uint8_t *momentum_types[2];
  void *const *params; /* NULL: updates are only shaped */
  const uint8_t *param_types;
  float blend, share, gain, sign, lr, shrink;
  int32_t shaped; /* whether the updates are shaped already */
};

enum { ITERATIONS = 5 };
static const float COEFFICIENTS[3] = {3.4445f, -4.7750f, 2.0315f};

/* A matrix divided by its norm is `first * second * x`; two factors, because one could lie beyond the range of floats. */
struct extent {
  float first, second, length;
  int usable; /* finite and not zero */
};

#define KERNEL "matrix_kernel.h"
#include "variants.h"

/* Shape and apply. Returns 0, or 1 when out of memory. */
int learned_optim_matrices(const struct matrices *matrices, int64_t scratch_bytes, int threads) {
  return DISPATCH(shape_all, matrices, scratch_bytes, threads);
}

/* Bytes of scratch memory that one matrix takes. */
int64_t learned_optim_matrix_scratch(int64_t rows, int64_t columns) {
  return (int64_t)(DISPATCH(scratch_floats, rows, columns) * sizeof(float));
}
