/* The LSTM kernels for one vector width. Included by lstm.c once for each instruction set, with LANES and SUFFIX set.
 *
 * Coordinates are taken in blocks. Inside a block everything is stored [unit][coordinate], so that every inner loop runs
 * over coordinates, the weights are broadcast, and the arithmetic is dense vector multiply-adds. Weights come packed as
 * [layer][unit][input..., hidden..., bias][gate], gates in torch's order i, f, g, o: the four gates of a unit are
 * computed together and squashed while they are in registers. The cell is squashed in a second pass over the units: the
 * two in one would wait for each other, a chain too long for a processor to look past.
 *
 * A coordinate that is not active keeps its memory. NaN and Inf never reach this file: the caller encodes them away.
 */
#include "vectors.h"

#define history NAME(history)
#define sigmoid_vec NAME(sigmoid_vec)
#define layer_inputs NAME(layer_inputs)
#define layer_weights NAME(layer_weights)
#define gather NAME(gather)
#define scatter NAME(scatter)
#define gather_mask NAME(gather_mask)
#define scratch NAME(scratch)
#define history_vectors NAME(history_vectors)
#define lay_out NAME(lay_out)
#define forward_block NAME(forward_block)
#define backward_block NAME(backward_block)
#define sum_lanes NAME(sum_lanes)
#define weight_gradient NAME(weight_gradient)
#define packed_size NAME(packed_size)

INLINE vec sigmoid_vec(vec x) { return tanh_vec(x * 0.5f) * 0.5f + 0.5f; }

/* Gate pre-activations of one unit for W vectors of coordinates, from the COLUMNS it reads: inputs, then hidden states. */
#define GATES(W, weights, read, columns, acc)                                 \
  do {                                                                        \
    const float *w_ = (weights);                                              \
    const float *bias_ = w_ + 4 * (columns);                                  \
    for (int g_ = 0; g_ < 4; g_++)                                            \
      for (int v_ = 0; v_ < (W); v_++) acc[g_][v_] = splat(bias_[g_]);        \
    for (int k_ = 0; k_ < (columns); k_++, w_ += 4)                           \
      for (int v_ = 0; v_ < (W); v_++) {                                      \
        vec x_ = (read)[k_ * (W) + v_];                                       \
        for (int g_ = 0; g_ < 4; g_++) acc[g_][v_] += w_[g_] * x_;            \
      }                                                                       \
  } while (0)

INLINE int layer_inputs(int layer, int F, int H) { return layer ? H : F; }

INLINE const float *layer_weights(const float *weights, int layer, int F, int H) {
  return layer ? weights + 4 * H * (F + H + 1) + (size_t)(layer - 1) * 4 * H * (2 * H + 1) : weights;
}

/* Rows of `source` (one coordinate each, `stride` floats apart) to columns of `block`; missing rows become zero. */
INLINE void gather(float *block, const float *source, int rows, int columns, size_t stride, int lanes) {
  if (rows < lanes) memset(block, 0, sizeof(float) * (size_t)columns * lanes);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) block[c * lanes + r] = source[r * stride + c];
}

INLINE void scatter(float *target, const float *block, int rows, int columns, size_t stride, int lanes) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) target[r * stride + c] = block[c * lanes + r];
}

INLINE void gather_mask(int32_t *mask, const uint8_t *active, int rows, int lanes) {
  for (int r = 0; r < lanes; r++) mask[r] = r < rows && (!active || active[r]) ? -1 : 0;
}

static float *scratch(size_t floats) {
  void *memory = NULL;
  return posix_memalign(&memory, 64, floats * sizeof(float)) ? NULL : memory;
}

/* ---- a sequence, forward and backward ------------------------------------------------------------------------------ */

#define SEQ_W 2 /* a block's whole history should stay in the second-level cache */
#define SEQ_LANES (SEQ_W * LANES)

/* What a block remembers of K steps, all [step][unit][coordinate]. */
typedef struct {
  vec *read[16];     /* per layer (K+1) x (inputs, H, 1): what it reads, its hidden state as kept, and a one for the bias */
  vec *gates[16];    /* per layer K x H x 4, activated; backward overwrites them with gradients of pre-activations */
  vec *cell[16];     /* per layer (K+1) x H, as kept */
  vec *squashed[16]; /* per layer K x H, tanh of the cell before the mask */
  vec *top;          /* K x H, the last layer's hidden state before the mask */
  ivec *mask;        /* K */
  vec *d_below, *d_hidden[16], *d_cell[16], *d_next;
} history;

static size_t history_vectors(int K, int F, int H, int L) {
  size_t read = (size_t)(K + 1) * (F + H + 1 + (size_t)(L - 1) * (2 * H + 1));
  size_t per_layer = (size_t)K * H * 4 + (size_t)(K + 1) * H + (size_t)K * H + 2 * (size_t)H;
  return SEQ_W * (read + L * per_layer + (size_t)K * H + K + 2 * (size_t)H);
}

static void lay_out(history *s, vec *memory, int K, int F, int H, int L) {
#define TAKE(count) (memory += (size_t)(count) * SEQ_W, memory - (size_t)(count) * SEQ_W)
  for (int l = 0; l < L; l++) {
    size_t columns = layer_inputs(l, F, H) + H + 1;
    s->read[l] = TAKE((K + 1) * columns);
    for (int t = 0; t < K; t++)
      for (int v = 0; v < SEQ_W; v++) s->read[l][((t + 1) * columns - 1) * SEQ_W + v] = splat(1.0f);
    s->gates[l] = TAKE((size_t)K * H * 4);
    s->cell[l] = TAKE((size_t)(K + 1) * H);
    s->squashed[l] = TAKE((size_t)K * H);
    s->d_hidden[l] = TAKE(H);
    s->d_cell[l] = TAKE(H);
  }
  s->mask = (ivec *)TAKE(K);
  s->top = TAKE((size_t)K * H);
  s->d_below = TAKE(H);
  s->d_next = TAKE(H);
#undef TAKE
}

static void forward_block(history *s, int rows, int K, int64_t N, int F, int H, int L, const float *inputs,
                          const float *hidden, const float *cell, const uint8_t *active, const float *weights) {
  size_t width = (size_t)L * H;
  for (int l = 0; l < L; l++) {
    gather((float *)(s->read[l] + layer_inputs(l, F, H) * SEQ_W), hidden + l * H, rows, H, width, SEQ_LANES);
    gather((float *)s->cell[l], cell + l * H, rows, H, width, SEQ_LANES);
  }
  for (int t = 0; t < K; t++) {
    ivec *mask = s->mask + t * SEQ_W;
    gather_mask((int32_t *)mask, active ? active + t * N : NULL, rows, SEQ_LANES);
    gather((float *)(s->read[0] + (size_t)t * (F + H + 1) * SEQ_W), inputs + (size_t)t * N * F, rows, F, F, SEQ_LANES);
    for (int l = 0; l < L; l++) {
      int below = layer_inputs(l, F, H), columns = below + H + 1;
      const vec *read = s->read[l] + (size_t)t * columns * SEQ_W, *c = s->cell[l] + (size_t)t * H * SEQ_W;
      const vec *h = read + below * SEQ_W;
      vec *h_new = s->read[l] + ((size_t)(t + 1) * columns + below) * SEQ_W;
      vec *c_new = s->cell[l] + (size_t)(t + 1) * H * SEQ_W, *squashed = s->squashed[l] + (size_t)t * H * SEQ_W;
      vec *gates = s->gates[l] + (size_t)t * H * 4 * SEQ_W;
      vec *out = l + 1 < L ? s->read[l + 1] + (size_t)t * (2 * H + 1) * SEQ_W : s->top + (size_t)t * H * SEQ_W;
      const float *w = layer_weights(weights, l, F, H);
      for (int unit = 0; unit < H; unit++, w += 4 * columns, gates += 4 * SEQ_W) {
        vec acc[4][SEQ_W];
        GATES(SEQ_W, w, read, below + H, acc);
        for (int v = 0; v < SEQ_W; v++) {
          int at = unit * SEQ_W + v;
          vec write = sigmoid_vec(acc[0][v]), forget = sigmoid_vec(acc[1][v]);
          vec candidate = tanh_vec(acc[2][v]), state = forget * c[at] + write * candidate;
          gates[v] = write, gates[SEQ_W + v] = forget, gates[2 * SEQ_W + v] = candidate;
          gates[3 * SEQ_W + v] = sigmoid_vec(acc[3][v]);
          squashed[at] = state;
          c_new[at] = select_vec(mask[v], state, c[at]);
        }
      }
      gates = s->gates[l] + (size_t)t * H * 4 * SEQ_W;
      for (int unit = 0; unit < H; unit++)
        for (int v = 0; v < SEQ_W; v++) {
          int at = unit * SEQ_W + v;
          squashed[at] = tanh_vec(squashed[at]);
          out[at] = gates[(unit * 4 + 3) * SEQ_W + v] * squashed[at];
          h_new[at] = select_vec(mask[v], out[at], h[at]);
        }
    }
  }
}

/* The gradient of COUNT units a layer read, from the gradients of its gates: enough sums at once to hide the latency of
 * multiply-add. It replaces `target`, or is added to it. */
#define THROUGH(COUNT, target, column, add)                                                            \
  do {                                                                                                 \
    vec total_[COUNT][SEQ_W];                                                                          \
    for (int j_ = 0; j_ < (COUNT); j_++)                                                               \
      for (int v_ = 0; v_ < SEQ_W; v_++) total_[j_][v_] = (add) ? (target)[j_ * SEQ_W + v_] : zero;    \
    const vec *gates_ = s->gates[l] + (size_t)t * H * 4 * SEQ_W;                                       \
    const float *row_ = w + 4 * (column);                                                              \
    for (int unit_ = 0; unit_ < H; unit_++, gates_ += 4 * SEQ_W, row_ += 4 * (below + H + 1))          \
      for (int g_ = 0; g_ < 4; g_++)                                                                   \
        for (int j_ = 0; j_ < (COUNT); j_++)                                                           \
          for (int v_ = 0; v_ < SEQ_W; v_++) total_[j_][v_] += row_[4 * j_ + g_] * gates_[g_ * SEQ_W + v_]; \
    for (int j_ = 0; j_ < (COUNT); j_++)                                                               \
      for (int v_ = 0; v_ < SEQ_W; v_++) (target)[j_ * SEQ_W + v_] = total_[j_][v_];                   \
  } while (0)

/* Gradients of the pre-activations of every gate, from the last step to the first. They replace the gates. */
static void backward_block(history *s, int rows, int K, int64_t N, int F, int H, int L, const float *d_top,
                           const float *weights) {
  const vec zero = splat(0.0f);
  for (int l = 0; l < L; l++)
    for (int i = 0; i < H * SEQ_W; i++) s->d_hidden[l][i] = zero, s->d_cell[l][i] = zero;
  for (int t = K - 1; t >= 0; t--) {
    const ivec *mask = s->mask + t * SEQ_W;
    gather((float *)s->d_below, d_top + (size_t)t * N * H, rows, H, H, SEQ_LANES);
    for (int l = L - 1; l >= 0; l--) {
      int below = layer_inputs(l, F, H);
      const float *w = layer_weights(weights, l, F, H);
      const vec *c = s->cell[l] + (size_t)t * H * SEQ_W, *squashed = s->squashed[l] + (size_t)t * H * SEQ_W;
      for (int unit = 0; unit < H; unit++)
        for (int v = 0; v < SEQ_W; v++) {
          int at = unit * SEQ_W + v;
          vec *gates = s->gates[l] + ((size_t)t * H + unit) * 4 * SEQ_W;
          vec write = gates[v], forget = gates[SEQ_W + v], candidate = gates[2 * SEQ_W + v], read = gates[3 * SEQ_W + v];
          /* A held coordinate passes the gradient of its memory through and takes none of its own. */
          vec kept_hidden = s->d_hidden[l][at], kept_cell = s->d_cell[l][at];
          vec d_hidden = s->d_below[at] + kept_hidden;
          vec d_cell = kept_cell + d_hidden * read * (1.0f - squashed[at] * squashed[at]);
          gates[v] = select_vec(mask[v], d_cell * candidate * write * (1.0f - write), zero);
          gates[SEQ_W + v] = select_vec(mask[v], d_cell * c[at] * forget * (1.0f - forget), zero);
          gates[2 * SEQ_W + v] = select_vec(mask[v], d_cell * write * (1.0f - candidate * candidate), zero);
          gates[3 * SEQ_W + v] = select_vec(mask[v], d_hidden * squashed[at] * read * (1.0f - read), zero);
          s->d_cell[l][at] = select_vec(mask[v], d_cell * forget, kept_cell);
          s->d_hidden[l][at] = select_vec(mask[v], zero, kept_hidden);
        }
      /* Through W_hh to the step before, and through W_ih to the layer below. */
      for (int part = l ? 0 : 1; part < 2; part++) {
        int first = part ? below : 0;
        vec *target = part ? s->d_hidden[l] : s->d_next;
        int k = 0;
        for (; k + 4 <= H; k += 4) THROUGH(4, target + k * SEQ_W, first + k, part);
        for (; k < H; k++) THROUGH(1, target + k * SEQ_W, first + k, part);
      }
      if (l)
        for (int i = 0; i < H * SEQ_W; i++) s->d_below[i] = s->d_next[i];
    }
  }
}

INLINE float sum_lanes(vec x) {
  float total = 0.0f;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

/* One tile of the weight gradient: the four gates of a unit against COUNT columns of what the layer read. */
#if LANES == 16 || defined(__aarch64__)
#define TILE_COLUMNS 4 /* 32 vector registers hold 16 sums and their operands */
#else
#define TILE_COLUMNS 3 /* 16 registers hold 12 */
#endif
#define SUM_TILE(COUNT, column, stride, d_row)                                              \
  do {                                                                                      \
    vec acc_[4][COUNT];                                                                     \
    for (int g_ = 0; g_ < 4; g_++)                                                          \
      for (int j_ = 0; j_ < (COUNT); j_++) acc_[g_][j_] = splat(0.0f);                      \
    for (int t_ = 0; t_ < K; t_++) {                                                        \
      const vec *gates_ = s->gates[l] + ((size_t)t_ * H + unit) * 4 * SEQ_W;                \
      const vec *x_ = (column) + (size_t)t_ * (stride) * SEQ_W;                             \
      for (int v_ = 0; v_ < SEQ_W; v_++)                                                    \
        for (int j_ = 0; j_ < (COUNT); j_++)                                                \
          for (int g_ = 0; g_ < 4; g_++) acc_[g_][j_] += gates_[g_ * SEQ_W + v_] * x_[j_ * SEQ_W + v_]; \
    }                                                                                       \
    for (int j_ = 0; j_ < (COUNT); j_++)                                                    \
      for (int g_ = 0; g_ < 4; g_++) (d_row)[4 * j_ + g_] += sum_lanes(acc_[g_][j_]);       \
  } while (0)

static void weight_gradient(const history *s, int K, int F, int H, int L, float *d_weights) {
  for (int l = 0; l < L; l++) {
    int columns = layer_inputs(l, F, H) + H + 1;
    for (int unit = 0; unit < H; unit++) {
      int k = 0;
      for (; k + TILE_COLUMNS <= columns; k += TILE_COLUMNS, d_weights += 4 * TILE_COLUMNS)
        SUM_TILE(TILE_COLUMNS, s->read[l] + k * SEQ_W, columns, d_weights);
      for (; k + 2 <= columns; k += 2, d_weights += 8) SUM_TILE(2, s->read[l] + k * SEQ_W, columns, d_weights);
      for (; k < columns; k++, d_weights += 4) SUM_TILE(1, s->read[l] + k * SEQ_W, columns, d_weights);
    }
  }
}

static size_t packed_size(int F, int H, int L) {
  return 4 * (size_t)H * (F + H + 1) + (size_t)(L - 1) * 4 * H * (2 * H + 1);
}

/* inputs (K, N, F); hidden, cell (N, L*H) at the start, L at most 16; active (K, N) or NULL. With d_top (K, N, H) NULL the
 * top hidden states go to top (K, N, H); otherwise the gradient of sum(d_top * top) is added to d_weights, packed like weights.
 * Each thread sums its own share of the blocks, and shares are added in order: a result depends on the thread count alone. */
static int NAME(lstm_sequence)(int K, int64_t N, int F, int H, int L, const float *inputs, const float *hidden,
                                const float *cell, const uint8_t *active, const float *weights, float *top,
                                const float *d_top, float *d_weights, int threads) {
  size_t size = packed_size(F, H, L), width = (size_t)L * H, wide = history_vectors(K, F, H, L);
  int64_t blocks = (N + SEQ_LANES - 1) / SEQ_LANES;
  float *shares = d_top ? calloc(size * threads, sizeof(float)) : NULL;
  if (d_top && !shares) return 1;
  int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1) reduction(| : failed)
  for (int share = 0; share < threads; share++) {
    vec *memory = (vec *)scratch(wide * LANES);
    if (!memory) {
      failed = 1;
      continue;
    }
    history s;
    lay_out(&s, memory, K, F, H, L);
    for (int64_t b = blocks * share / threads; b < blocks * (share + 1) / threads; b++) {
      int64_t n = b * SEQ_LANES;
      int rows = N - n < SEQ_LANES ? (int)(N - n) : SEQ_LANES;
      forward_block(&s, rows, K, N, F, H, L, inputs + n * F, hidden + n * width, cell + n * width,
                    active ? active + n : NULL, weights);
      if (d_top) {
        backward_block(&s, rows, K, N, F, H, L, d_top + n * H, weights);
        weight_gradient(&s, K, F, H, L, shares + size * share);
      } else {
        for (int t = 0; t < K; t++)
          scatter(top + ((size_t)t * N + n) * H, (float *)(s.top + (size_t)t * H * SEQ_W), rows, H, H, SEQ_LANES);
      }
    }
    free(memory);
  }
  if (d_top && !failed)
    for (int share = 0; share < threads; share++)
      for (size_t i = 0; i < size; i++) d_weights[i] += shares[size * share + i];
  free(shares);
  return failed;
}

#undef GATES
#undef SUM_TILE
#undef TILE_COLUMNS
#undef THROUGH
#undef SEQ_W
#undef SEQ_LANES
#undef TILE
#undef SHUFFLE_PARTS
#undef JOIN_ROWS
#undef SPLIT_ROWS
#undef LANES
#undef SUFFIX
#undef ISA_AVX2
#undef ISA_AVX512
