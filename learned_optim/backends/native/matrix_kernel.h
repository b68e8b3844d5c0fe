/* The matrix stage for one instruction set. Included by matrix.c.
 *
 * With m the shorter and n the longer side, a matrix lies `tall` (n, m) while it is iterated, so that its Gram matrix and
 * every product is a sum of rows times numbers. Rows are padded with zeros to whole vectors. A Gram matrix and polynomials in
 * it are symmetric: the blocks above the diagonal are computed, the others copied.
 */
#include "vectors.h"

#define padded NAME(padded)
#define stride_of NAME(stride_of)
#define load_part NAME(load_part)
#define store_part NAME(store_part)
#define lane_sum NAME(lane_sum)
#define measure_extent NAME(measure_extent)
#define turn NAME(turn)
#define multiply_block NAME(multiply_block)
#define multiply NAME(multiply)
#define multiply_symmetric NAME(multiply_symmetric)
#define factor_of NAME(factor_of)
#define buffer_floats NAME(buffer_floats)
#define scratch_floats NAME(scratch_floats)
#define read_momentum NAME(read_momentum)
#define mix NAME(mix)
#define iterate_gram NAME(iterate_gram)
#define iterate NAME(iterate)
#define orthogonalize NAME(orthogonalize)
#define shape_matrix NAME(shape_matrix)
#define apply_update NAME(apply_update)
#define shape_all NAME(shape_all)

/* A block of a product: so many rows times so many vectors are summed at once, as many as the registers hold. */
#ifdef ISA_AVX512
#define BLOCK_ROWS 8
#define BLOCK_VECTORS 2
#else
#define BLOCK_ROWS 4
#define BLOCK_VECTORS 2
#endif
#define DEPTH 128 /* rows of the right-hand factor that are used together: they stay in the first-level cache */
#define PIECE 64  /* vectors summed in float32 before the sum goes on in float64 */

INLINE int64_t padded(int64_t side, int64_t multiple) { return (side + multiple - 1) / multiple * multiple; }

/* Floats from one row to the next: never a multiple of 256 bytes, which would crowd few sets of the cache. */
INLINE int64_t stride_of(int64_t side) {
  int64_t floats = padded(side, LANES);
  return floats % 64 ? floats : floats + (LANES < 16 ? 16 : LANES);
}

/* The first `left` numbers of a vector; zeros behind. */
INLINE vec load_part(const float *from, int64_t left) {
  if (left >= LANES) return load_vec(from);
#if defined(ISA_AVX512)
  return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), from);
#else
  vec x = {0};
  for (int64_t i = 0; i < left; i++) x[i] = from[i];
  return x;
#endif
}

INLINE void store_part(float *to, vec x, int64_t left) {
  if (left >= LANES) {
    store_vec(to, x);
    return;
  }
#if defined(ISA_AVX512)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << left) - 1), (__m512)x);
#else
  for (int64_t i = 0; i < left; i++) to[i] = x[i];
#endif
}

INLINE double lane_sum(vec x) {
  double sum = 0.0;
  for (int i = 0; i < LANES; i++) sum += (double)x[i];
  return sum;
}

/* Norm and range of `size` numbers. The largest is divided out before they are squared: no scale over- or underflows. */
static struct extent measure_extent(const float *x, int64_t size) {
  ivec largest = {0};
  for (int64_t i = 0; i < size; i += LANES) {
    ivec bits = (ivec)load_part(x + i, size - i) & 0x7fffffff, more = bits > largest;
    largest = (bits & more) | (largest & ~more);
  }
  int32_t bits = 0; /* as integers, NaN is above Inf and Inf above all numbers */
  for (int i = 0; i < LANES; i++) bits = largest[i] > bits ? largest[i] : bits;
  struct extent extent = {.first = 1.0f, .usable = bits > 0 && bits < 0x7f800000};
  if (!extent.usable) return extent;
  const float peak = bits_to_float((uint32_t)bits);
  if (peak < 1e-30f) extent.first = 0x1p100f;
  if (peak > 1e30f) extent.first = 0x1p-100f;
  const float inverse = 1.0f / (peak * extent.first);
  double total = 0.0;
  for (int64_t start = 0; start < size; start += PIECE * LANES) {
    const int64_t end = start + PIECE * LANES < size ? start + PIECE * LANES : size;
    vec sum = {0};
    for (int64_t i = start; i < end; i += LANES) {
      vec scaled = load_part(x + i, end - i) * extent.first * inverse;
      sum += scaled * scaled;
    }
    total += lane_sum(sum);
  }
  const float norm = (float)sqrt(total);
  extent.second = inverse / norm;
  extent.length = norm * peak;
  return extent;
}

/* Transpose `rows` (a multiple of LANES) by `columns` (a multiple of 4). */
static void turn(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 4)
    for (int64_t r = 0; r < rows; r += TILE) {
      tile m[4];
      load_tile(m, from + r * from_stride + c, (size_t)from_stride, 0);
      transpose_tile(m);
      UNROLL for (int j = 0; j < 4; j++) *(tile *)(to + (c + j) * to_stride + r) = m[j];
    }
}

/* ---- products ----------------------------------------------------------------------------------------------------------- */

/* C = alpha A B + beta S. Number (i, k) of A lies at i * row + k * column, so A may be a transpose; S lies like C. */
struct NAME(product) {
  float *c;
  int64_t c_stride;
  const float *a;
  int64_t row, column;
  const float *b;
  int64_t b_stride, depth;
  float alpha, beta;
  const float *s; /* or NULL */
};

INLINE void multiply_block(const struct NAME(product) * p, int64_t i, int64_t j, int64_t start, const int rows, const int vectors) {
  const int64_t end = start + DEPTH < p->depth ? start + DEPTH : p->depth;
  const float *a = p->a + i * p->row, *b = p->b + j;
  const int64_t row = p->row, column = p->column, b_stride = p->b_stride, c_stride = p->c_stride;
  float *c = p->c + i * c_stride + j;
  vec sums[BLOCK_ROWS][BLOCK_VECTORS];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = start ? load_vec(c + r * c_stride + v * LANES) : splat(0.0f);
  for (int64_t k = start; k < end; k++) {
    vec right[BLOCK_VECTORS];
    UNROLL for (int v = 0; v < vectors; v++) right[v] = load_vec(b + k * b_stride + v * LANES);
    UNROLL for (int r = 0; r < rows; r++) {
      const vec left = splat(a[r * row + k * column]);
      UNROLL for (int v = 0; v < vectors; v++) sums[r][v] += left * right[v];
    }
  }
  if (end == p->depth && p->s) {
    const float *s = p->s + i * c_stride + j;
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vectors; v++)
        sums[r][v] = p->alpha * sums[r][v] + p->beta * load_vec(s + r * c_stride + v * LANES);
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vectors; v++) store_vec(c + r * c_stride + v * LANES, sums[r][v]);
}

/* `rows` a multiple of 4, `columns` of LANES; of a symmetric product, blocks below the diagonal may be left out. */
static void multiply(const struct NAME(product) * p, int64_t rows, int64_t columns, int symmetric) {
  for (int64_t start = 0; start < p->depth; start += DEPTH)
    for (int64_t j = 0; j < columns; j += BLOCK_VECTORS * LANES) {
      const int two = columns - j >= 2 * LANES;
      for (int64_t i = 0; i < rows; i += BLOCK_ROWS) {
        if (symmetric && j + (1 + two) * LANES <= i / LANES * LANES) break;
#if BLOCK_ROWS > 4
        if (rows - i < BLOCK_ROWS) {
          two ? multiply_block(p, i, j, start, 4, 2) : multiply_block(p, i, j, start, 4, 1);
          continue;
        }
#endif
        two ? multiply_block(p, i, j, start, BLOCK_ROWS, 2) : multiply_block(p, i, j, start, BLOCK_ROWS, 1);
      }
    }
}

/* A product of side m that is symmetric. */
static void multiply_symmetric(const struct NAME(product) * p, int64_t m) {
  const int64_t stride = p->c_stride, side = padded(m, LANES);
  multiply(p, padded(m, 4), side, 1);
  for (int64_t i = LANES; i < side; i += LANES)
    for (int64_t j = 0; j < i; j += LANES) turn(p->c + i * stride + j, stride, p->c + j * stride + i, stride, LANES, LANES);
}

/* ---- Newton-Schulz ------------------------------------------------------------------------------------------------------ */

#define SQUARE_PRODUCT(to, left, right)                                                                             \
  (&(struct NAME(product)){.c = to, .c_stride = stride, .a = left, .row = stride, .column = 1, .b = right, .b_stride = stride, \
                           .depth = m, .alpha = 1.0f})

/* b A + c A^2 */
static void factor_of(float *factor, const float *gram, int64_t stride, int64_t m) {
  struct NAME(product) p = *SQUARE_PRODUCT(factor, gram, gram);
  p.alpha = COEFFICIENTS[2], p.beta = COEFFICIENTS[1], p.s = gram;
  multiply_symmetric(&p, m);
}

/* The product P_4 ... P_0 of the Gram form, to be multiplied with from the left, or P_0 ... P_4 for the right. */
static float *iterate_gram(float *squares[5], int64_t stride, int64_t m, int left) {
  float *gram = squares[0], *factor = squares[1], *half = squares[2], *product = squares[3], *next = squares[4], *kept;
  for (int k = 0; k < ITERATIONS; k++) {
    factor_of(factor, gram, stride, m);
    for (int64_t i = 0; i < m; i++) factor[i * stride + i] += COEFFICIENTS[0];
    if (k < ITERATIONS - 1) {
      multiply_symmetric(SQUARE_PRODUCT(half, factor, gram), m);
      multiply_symmetric(SQUARE_PRODUCT(gram, half, factor), m);
    }
    if (k == 0) {
      kept = product, product = factor, factor = kept;
      continue;
    }
    /* In full: rounding has turned the factors a little, and for a matrix of low rank half of each order would not do. */
    multiply(left ? SQUARE_PRODUCT(next, factor, product) : SQUARE_PRODUCT(next, product, factor), padded(m, 4),
             padded(m, LANES), 0);
    kept = product, product = next, next = kept;
  }
  return product;
}

INLINE int64_t buffer_floats(int64_t m, int64_t n) {
  int64_t wide = padded(m, LANES) * stride_of(n), tall = padded(n, LANES) * stride_of(m);
  return padded(wide > tall ? wide : tall, 16);
}

/* Floats of scratch memory for one matrix. */
static size_t scratch_floats(int64_t rows, int64_t columns) {
  int64_t m = rows < columns ? rows : columns, n = rows < columns ? columns : rows;
  return (size_t)(3 * buffer_floats(m, n) + 5 * padded(padded(m, LANES) * stride_of(m), 16) + 16);
}

/* Orthogonalise a matrix of norm 1 that lies in the first buffer; returns the buffer that the result lies in. */
static float *orthogonalize(float *buffers[3], float *squares[5], int64_t rows, int64_t columns) {
  const int is_wide = rows <= columns, by_gram = is_wide ? padded(columns, 4) > 2 * padded(rows, 4) : padded(rows, 4) > 2 * padded(columns, 4);
  const int64_t m = is_wide ? rows : columns, n = is_wide ? columns : rows;
  const int64_t stride = stride_of(m), wide_stride = stride_of(n), side = padded(m, LANES);
  float *tall = buffers[0], *other = buffers[1];
  if (is_wide) {
    tall = buffers[1], other = buffers[2];
    turn(tall, stride, buffers[0], wide_stride, side, padded(n, 4));
  }
  const int iterations = by_gram ? 1 : ITERATIONS;
  for (int k = 0; k < iterations; k++) {
    struct NAME(product) gram = {.c = squares[0], .c_stride = stride, .a = tall, .row = 1, .column = stride, .b = tall,
                                 .b_stride = stride, .depth = n};
    multiply_symmetric(&gram, m);
    if (by_gram) break;
    factor_of(squares[1], squares[0], stride, m);
    struct NAME(product) next = {.c = other, .c_stride = stride, .a = tall, .row = stride, .column = 1, .b = squares[1],
                                 .b_stride = stride, .depth = m, .alpha = 1.0f, .beta = COEFFICIENTS[0], .s = tall};
    multiply(&next, padded(n, 4), side, 0);
    float *kept = tall;
    tall = other, other = kept;
  }
  if (by_gram) {
    const float *product = iterate_gram(squares, stride, m, is_wide);
    struct NAME(product) last = {.c = buffers[1], .c_stride = is_wide ? wide_stride : stride, .a = is_wide ? product : buffers[0],
                                 .row = stride, .column = 1, .b = is_wide ? buffers[0] : product,
                                 .b_stride = is_wide ? wide_stride : stride, .depth = m};
    multiply(&last, padded(rows, 4), padded(columns, LANES), 0);
    return buffers[1];
  }
  if (!is_wide) return tall;
  const int64_t short_of = padded(n, LANES) - padded(n, 4);
  memset(tall + padded(n, 4) * stride, 0, sizeof(float) * (size_t)(short_of * stride));
  turn(buffers[0], wide_stride, tall, stride, padded(n, LANES), padded(m, 4));
  return buffers[0];
}

/* ---- one matrix --------------------------------------------------------------------------------------------------------- */

/* The raw momentum as float32 numbers; 0 if there is none. */
static int read_momentum(float *to, const struct matrices *all, int64_t at, int64_t size) {
  int found = 0;
  for (int which = 0; which < 2; which++) {
    if (!all->momenta[which]) continue;
    const void *from = all->momenta[which][at];
    const int type = all->momentum_types[which][at];
    for (int64_t i = 0; i < size; i++) {
      const float x = type == FLOAT32 ? ((const float *)from)[i] : from_bfloat16(((const uint16_t *)from)[i]);
      to[i] = found ? to[i] + x : x;
    }
    found = 1;
  }
  if (found && all->sign != 1.0f)
    for (int64_t i = 0; i < size; i++) to[i] *= all->sign;
  return found;
}

/* The direction, of norm 1, in rows of whole vectors with zeros behind and below. */
static void mix(float *to, const float *update, struct extent own, const float *momentum, struct extent other, float share,
                int64_t rows, int64_t columns) {
  const int64_t stride = stride_of(columns), width = padded(columns, LANES), height = padded(rows, LANES);
  const float first = own.second * (1.0f - share), second = other.second * share;
  double total = 0.0;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t start = 0; start < columns; start += PIECE * LANES) {
      const int64_t end = start + PIECE * LANES < columns ? start + PIECE * LANES : columns;
      vec sum = {0};
      for (int64_t c = start; c < end; c += LANES) {
        vec x = load_part(update + r * columns + c, end - c) * own.first * first;
        if (momentum) x += load_part(momentum + r * columns + c, end - c) * other.first * second;
        sum += x * x;
        store_vec(to + r * stride + c, x);
      }
      total += lane_sum(sum);
    }
  const float inverse = total > 0.0 ? (float)(1.0 / sqrt(total)) : 1.0f;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < width; c += LANES) store_vec(to + r * stride + c, load_vec(to + r * stride + c) * inverse);
  memset(to + rows * stride, 0, sizeof(float) * (size_t)((height - rows) * stride));
}

static void shape_matrix(const struct matrices *all, int64_t at, float *scratch) {
  const int64_t rows = all->rows[at], columns = all->columns[at], m = rows < columns ? rows : columns, n = rows + columns - m;
  const int64_t stride = stride_of(columns), square = padded(padded(m, LANES) * stride_of(m), 16);
  float *update = all->updates[at], *buffers[3], *squares[5];
  for (int k = 0; k < 3; k++) buffers[k] = scratch + k * buffer_floats(m, n);
  for (int k = 0; k < 5; k++) squares[k] = scratch + 3 * buffer_floats(m, n) + k * square;
  const struct extent own = measure_extent(update, rows * columns);
  if (!own.usable) return;
  struct extent other = {.first = 1.0f};
  float *momentum = buffers[1];
  const int follows = all->share != 0.0f && read_momentum(momentum, all, at, rows * columns);
  if (follows) other = measure_extent(momentum, rows * columns);
  const float share = follows ? all->share : 0.0f; /* of a momentum that is not usable too: alone, it gives no direction */
  mix(buffers[0], update, own, other.usable ? momentum : NULL, other, share, rows, columns);
  const float *orthogonal = orthogonalize(buffers, squares, rows, columns);

  double total = 0.0;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t start = 0; start < columns; start += PIECE * LANES) {
      const int64_t end = start + PIECE * LANES < columns ? start + PIECE * LANES : columns;
      vec sum = {0};
      for (int64_t c = start; c < end; c += LANES) {
        vec x = load_vec(orthogonal + r * stride + c), u = load_part(update + r * columns + c, end - c);
        x = (vec)((ivec)x & (u != 0.0f));
        sum += x * x;
      }
      total += lane_sum(sum);
    }
  const float norm = (float)sqrt(total), factor = all->blend * (own.length * all->gain * (norm > 0.0f ? 1.0f / norm : 1.0f));
  const float keep = 1.0f - all->blend;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c += LANES) {
      float *to = update + r * columns + c;
      vec x = load_vec(orthogonal + r * stride + c), u = load_part(to, columns - c);
      x = (vec)((ivec)(x * factor) & (u != 0.0f));
      store_part(to, keep == 0.0f ? x : u * keep + x, columns - c);
    }
}

/* param = shrink * param + lr * update */
static void apply_update(const struct matrices *all, int64_t at) {
  const int64_t size = all->rows[at] * all->columns[at];
  const float *update = all->updates[at];
  const int type = all->param_types[at];
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t left = size - i < LANES ? size - i : LANES;
    if (type == FLOAT32) {
      float *param = (float *)all->params[at] + i;
      store_part(param, load_part(param, left) * all->shrink + load_part(update + i, left) * all->lr, left);
      continue;
    }
    uint16_t *param = (uint16_t *)all->params[at] + i;
    vec wide = {0};
    for (int64_t j = 0; j < left; j++) wide[j] = type == BFLOAT16 ? from_bfloat16(param[j]) : from_float16(param[j]);
    wide = wide * all->shrink + load_part(update + i, left) * all->lr;
    for (int64_t j = 0; j < left; j++) param[j] = type == BFLOAT16 ? to_bfloat16(wide[j]) : to_float16(wide[j]);
  }
}

static int shape_all(const struct matrices *all, int64_t scratch_bytes, int threads) {
  size_t floats = 0;
  double work = 0.0;
  for (int64_t i = 0; i < all->count; i++) {
    const int64_t rows = all->rows[i], columns = all->columns[i], m = rows < columns ? rows : columns;
    const size_t needed = all->shaped ? 0 : scratch_floats(rows, columns);
    floats = needed > floats ? needed : floats;
    work += (double)rows * (double)columns * (all->shaped ? 4.0 : 20.0 * (double)m + 100.0);
  }
  const double worth = 1.0 + work / 2e6; /* a thread must be worth the microseconds that waking it takes */
  if (threads > worth) threads = (int)worth;
  while (threads > 1 && (int64_t)(floats * sizeof(float)) * threads > scratch_bytes) threads--;
  if (threads < 1) threads = 1;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
  {
    float *memory = floats ? malloc(floats * sizeof(float)) : NULL;
    float *scratch = (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    failed |= floats && !memory;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < all->count; i++) {
      if (floats && !memory) continue;
      if (!all->shaped) shape_matrix(all, i, scratch);
      if (all->params) apply_update(all, i);
    }
    free(memory);
  }
  return failed;
}

#undef BLOCK_ROWS
#undef BLOCK_VECTORS
#undef DEPTH
#undef PIECE
#undef SQUARE_PRODUCT
#undef TILE
#undef SHUFFLE_PARTS
#undef JOIN_ROWS
#undef SPLIT_ROWS
#undef LANES
#undef SUFFIX
#undef ISA_AVX2
#undef ISA_AVX512
