/* One whole inner step -- encode, LSTM, decode, parameter update -- for one instruction set. Included by step.c.
 *
 * Coordinates are taken in blocks of BLOCK. Inside a block every number is stored [unit][coordinate], so that each inner
 * loop runs over coordinates, weights are broadcast and the arithmetic is dense multiply-adds. A block's memory is read
 * and transposed once, lives in the first-level cache until the block is done, and is written once.
 */
#include "vectors.h"

#define block_buffers NAME(block_buffers)
#define vectors_needed NAME(vectors_needed)
#define lay_out_buffers NAME(lay_out_buffers)
#define read_values NAME(read_values)
#define write_values NAME(write_values)
#define read_bytes NAME(read_bytes)
#define write_bytes NAME(write_bytes)
#define hash_gradients NAME(hash_gradients)
#define rounds NAME(rounds)
#define draw NAME(draw)
#define round_moment NAME(round_moment)
#define read_cells NAME(read_cells)
#define read_hiddens NAME(read_hiddens)
#define write_cells NAME(write_cells)
#define write_hiddens NAME(write_hiddens)
#define read_memory NAME(read_memory)
#define write_memory NAME(write_memory)
#define read_eights NAME(read_eights)
#define write_eights NAME(write_eights)
#define decay_moment NAME(decay_moment)
#define encode_adam NAME(encode_adam)
#define encode_paper NAME(encode_paper)
#define add_products NAME(add_products)
#define run_lstm NAME(run_lstm)
#define read_out NAME(read_out)
#define decode_block NAME(decode_block)
#define squash_cells NAME(squash_cells)
#define squash_hiddens NAME(squash_hiddens)
#define in_rows NAME(in_rows)
#define turn_weights NAME(turn_weights)
#define read_rows NAME(read_rows)
#define write_rows NAME(write_rows)
#define multiply_pair NAME(multiply_pair)
#define step_rows NAME(step_rows)
#define step_block NAME(step_block)
#define step_items NAME(step_items)
#define step_all NAME(step_all)
#define sum_of_squares NAME(sum_of_squares)
#define sum_of NAME(sum_of)
#define sums_of NAME(sums_of)
#define count_and_measure NAME(count_and_measure)
#define evaluate NAME(evaluate)
#define fetch NAME(fetch)
#define fetch_share NAME(fetch_share)
#define look_ahead NAME(look_ahead)
#define fetch_item NAME(fetch_item)
#define share_start NAME(share_start)

/* A block is W vectors of coordinates: enough independent work to hide the latency of every operation, and still within
 * the first-level cache. Four gates times GROUP vectors are summed at once: as many as the registers hold. */
#define W 4
#if defined(ISA_AVX512) || defined(__aarch64__)
#define GROUP 4
#define SQUASH_AT_ONCE 1 /* exponentials beside the products of the next unit; with fewer registers they are in their way */
#else
#define GROUP 2
#define SQUASH_AT_ONCE 0
#endif
#define BLOCK (W * LANES)

/* ---- values: parameters, gradients, moments --------------------------------------------------------------------------- */

/* `rows` values from index `start`, as floats: in place where they are floats and fill the block, else in `staging`. */
INLINE const float *read_values(const void *source, int type, int64_t start, int rows, float *staging) {
  if (type == FLOAT32) {
    const float *from = (const float *)source + start;
    if (rows == BLOCK) return from;
    memcpy(staging, from, sizeof(float) * rows);
  } else {
    uint16_t halves[BLOCK];
    memcpy(halves, (const uint16_t *)source + start, sizeof(uint16_t) * rows);
    memset(halves + rows, 0, sizeof(uint16_t) * (BLOCK - rows));
    if (type == BFLOAT16)
      for (int i = 0; i < BLOCK; i++) staging[i] = from_bfloat16(halves[i]);
    else
      for (int i = 0; i < BLOCK; i++) staging[i] = from_float16(halves[i]);
  }
  memset(staging + rows, 0, sizeof(float) * (BLOCK - rows));
  return staging;
}

INLINE void write_values(void *target, int type, int64_t start, int rows, const vec values[W]) {
  if (type == FLOAT32) {
    memcpy((float *)target + start, values, sizeof(float) * rows);
    return;
  }
  const float *from = (const float *)values;
  uint16_t halves[BLOCK];
  if (type == BFLOAT16)
    for (int i = 0; i < BLOCK; i++) halves[i] = to_bfloat16(from[i]);
  else
    for (int i = 0; i < BLOCK; i++) halves[i] = to_float16(from[i]);
  memcpy((uint16_t *)target + start, halves, sizeof(uint16_t) * rows);
}

/* ---- LSTM memory: rows of `width` numbers, one row a coordinate -------------------------------------------------------- */

/* Where byte j of a word lies, as a shift from the lowest. */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define BYTE(j) (24 - 8 * (j))
#else
#define BYTE(j) (8 * (j))
#endif

/* 8-bit integers to [unit][coordinate], four units of a coordinate to a word. */
INLINE void read_bytes(vec *block, const int8_t *memory, int64_t start, int rows, int width) {
  const int8_t *from = memory + (size_t)start * width;
  if (width < 4) {
    float *to = (float *)block;
    memset(to, 0, sizeof(float) * (size_t)width * BLOCK);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < width; c++) to[(size_t)c * BLOCK + r] = from[(size_t)r * width + c];
    return;
  }
  for (int next = 0; next < width; next += 4) {
    int c = next + 4 > width ? width - 4 : next; /* the last word overlaps the one before */
    ivec words[W] = {{0}};
    for (int r = 0; r < rows; r++) memcpy((int32_t *)words + r, from + (size_t)r * width + c, 4);
    for (int v = 0; v < W; v++)
      UNROLL for (int j = 0; j < 4; j++)
        block[(c + j) * W + v] = __builtin_convertvector(words[v] << (24 - BYTE(j)) >> 24, vec);
  }
}

INLINE void write_bytes(int8_t *memory, int64_t start, int rows, int width, const vec *block) {
  int8_t *to = memory + (size_t)start * width;
  if (width < 4) {
    const float *from = (const float *)block;
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < width; c++) to[(size_t)r * width + c] = (int8_t)from[(size_t)c * BLOCK + r];
    return;
  }
  for (int next = 0; next < width; next += 4) {
    int c = next + 4 > width ? width - 4 : next;
    ivec words[W] = {{0}};
    for (int v = 0; v < W; v++)
      UNROLL for (int j = 0; j < 4; j++)
        words[v] |= (__builtin_convertvector(block[(c + j) * W + v], ivec) & 255) << BYTE(j);
    for (int r = 0; r < rows; r++) memcpy(to + (size_t)r * width + c, (const int32_t *)words + r, 4);
  }
}

/* LANES rows of memory to [unit][coordinate] and back, where a row is a multiple of eight numbers; else return 0. */
INLINE int read_eights(float *to, const void *memory, int bfloat16, int64_t row, int width) {
#if LANES == 16
  const size_t bytes = bfloat16 ? 2 : 4;
  const char *from = (const char *)memory + (size_t)row * width * bytes;
  if (width % 8) return 0;
  if (width == 8) return load_eights(to, BLOCK, from, 8, bfloat16), 1; /* a constant: two rows in one load */
  for (int c = 0; c < width; c += 8) load_eights(to + (size_t)c * BLOCK, BLOCK, from + c * bytes, width, bfloat16);
  return 1;
#else
  return 0;
#endif
}

INLINE int write_eights(void *memory, int bfloat16, int64_t row, int width, const float *from) {
#if LANES == 16
  const size_t bytes = bfloat16 ? 2 : 4;
  char *to = (char *)memory + (size_t)row * width * bytes;
  if (width % 8) return 0;
  if (width == 8) return store_eights(to, 8, bfloat16, from, BLOCK), 1;
  for (int c = 0; c < width; c += 8) store_eights(to + c * bytes, width, bfloat16, from + (size_t)c * BLOCK, BLOCK);
  return 1;
#else
  return 0;
#endif
}

/* Floats and bfloat16 to [unit][coordinate]. */
INLINE void read_memory(vec *block, const void *memory, int type, int64_t start, int rows, int width) {
  float *to = (float *)block;
  int bfloat16 = type == BFLOAT16, tiled = width >= 4 ? rows / TILE * TILE : 0;
  if (rows < BLOCK) memset(to, 0, sizeof(float) * (size_t)width * BLOCK);
  for (int r = 0; r < tiled; r += TILE) {
    if (read_eights(to + r, memory, bfloat16, start + r, width)) continue;
    for (int next = 0; next < width; next += 4) {
      int c = next + 4 > width ? width - 4 : next; /* the last tile overlaps the one before */
      size_t at = (size_t)(start + r) * width + c;
      tile m[4];
      if (bfloat16)
        load_tile(m, (const uint16_t *)memory + at, width, 1);
      else
        load_tile(m, (const float *)memory + at, width, 0);
      transpose_tile(m);
      UNROLL for (int j = 0; j < 4; j++) *(tile *)(to + (size_t)(c + j) * BLOCK + r) = m[j];
    }
  }
  for (int r = tiled; r < rows; r++)
    for (int c = 0; c < width; c++) {
      size_t at = (size_t)(start + r) * width + c;
      to[(size_t)c * BLOCK + r] = bfloat16 ? from_bfloat16(((const uint16_t *)memory)[at]) : ((const float *)memory)[at];
    }
}

INLINE void write_memory(void *memory, int type, int64_t start, int rows, int width, const vec *block) {
  const float *from = (const float *)block;
  int bfloat16 = type == BFLOAT16, tiled = width >= 4 ? rows / TILE * TILE : 0;
  for (int r = 0; r < tiled; r += TILE) {
    if (write_eights(memory, bfloat16, start + r, width, from + r)) continue;
    for (int next = 0; next < width; next += 4) {
      int c = next + 4 > width ? width - 4 : next;
      size_t at = (size_t)(start + r) * width + c;
      tile m[4];
      UNROLL for (int j = 0; j < 4; j++) m[j] = *(const tile *)(from + (size_t)(c + j) * BLOCK + r);
      transpose_tile(m);
      if (bfloat16)
        store_tile(m, (uint16_t *)memory + at, width, 1);
      else
        store_tile(m, (float *)memory + at, width, 0);
    }
  }
  for (int r = tiled; r < rows; r++)
    for (int c = 0; c < width; c++) {
      size_t at = (size_t)(start + r) * width + c;
      float value = from[(size_t)c * BLOCK + r];
      if (bfloat16)
        ((uint16_t *)memory)[at] = to_bfloat16(value);
      else
        ((float *)memory)[at] = value;
    }
}

/* ---- the three stages --------------------------------------------------------------------------------------------------- */

typedef struct {
  vec *inputs;               /* F x W, without the features of time, which are in the bias */
  vec *hidden, *cell, *next; /* L*H x W: before, before and then after, would-be after */
  vec *gates;                /* of one layer: 4 x H x W */
  vec *scales;               /* of 8-bit cells: L x W */
  float *bias;               /* of layer 0, with the features of time: H x 4 */
  vec *turned;               /* where memory is taken in rows, weights for that */
  vec grad[W], context[2][W], update[W];
  ivec active[W];
  uvec noise[W];
  struct { /* the memory of the block after this one */
    const char *hidden, *cell;
    size_t share; /* bytes of either for each unit */
  } ahead;
} block_buffers;

INLINE void fetch(const void *from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) FETCH((const char *)from + i);
}

/* Whether memory is taken as it lies; see step_rows. */
INLINE int in_rows(const struct rule *rule, int memory_type) {
  return rule->family == ADAM_MODULATION && rule->layers == 1 && rule->hidden == LANES && memory_type != INT8;
}

INLINE size_t vectors_needed(const struct rule *rule) {
  return W * (size_t)(encoded_inputs(rule) + (3 * rule->layers + 4) * rule->hidden + rule->layers) +
         (size_t)rule->hidden * 4 / LANES + 1 + (in_rows(rule, FLOAT32) ? 4 * (1 + 4 + LANES) : 0);
}

INLINE void lay_out_buffers(block_buffers *b, vec *memory, const struct rule *rule) {
  size_t width = (size_t)rule->layers * rule->hidden * W;
  b->inputs = memory;
  b->hidden = b->inputs + (size_t)encoded_inputs(rule) * W;
  b->cell = b->hidden + width;
  b->next = b->cell + width;
  b->gates = b->next + width;
  b->scales = b->gates + (size_t)4 * rule->hidden * W;
  b->bias = (float *)(b->scales + (size_t)rule->layers * W);
  b->turned = (vec *)b->bias + (size_t)rule->hidden * 4 / LANES + 1;
}

/* ---- memory in fewer bytes: rules/storage.py says what is stored and why ------------------------------------------------- */

/* Whether anything is rounded stochastically. */
INLINE int rounds(const struct rule *rule, const struct item *item) {
  int any = item->memory_type == INT8;
  for (int i = 0; i < (rule->family == PAPER ? 0 : 3); i++) any |= item->moment_types[i] == BFLOAT16;
  return any;
}

/* Of the gradients as the caller has them, and the step. */
INLINE void hash_gradients(block_buffers *b, const float *grads, float step) {
  for (int v = 0; v < W; v++) {
    uvec x = (uvec)load_vec(grads + v * LANES) ^ ((uint32_t)step * 0x9e3779b9u);
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    b->noise[v] = x ^ x >> 16;
  }
}

/* 16 random bits for one unit of each coordinate. */
INLINE uvec draw(const block_buffers *b, int unit, int v) { return (b->noise[v] + unit * 0x9e3779b9u) >> 16; }

INLINE vec round_moment(const block_buffers *b, vec moment, int unit, int v) {
  return (vec)(((uvec)moment + draw(b, unit, v)) & 0xffff0000u);
}

INLINE void read_hiddens(block_buffers *b, const struct rule *rule, const struct item *item, int64_t start, int rows) {
  const int width = rule->layers * rule->hidden;
  if (item->memory_type != INT8) {
    read_memory(b->hidden, item->hidden, item->memory_type, start, rows, width);
    return;
  }
  read_bytes(b->hidden, item->hidden, start, rows, width);
  for (int i = 0; i < width * W; i++) b->hidden[i] *= 1.0f / 127.0f;
}

INLINE void read_cells(block_buffers *b, const struct rule *rule, const struct item *item, int64_t start, int rows) {
  const int L = rule->layers, H = rule->hidden;
  if (item->memory_type != INT8) {
    read_memory(b->cell, item->cell, item->memory_type, start, rows, L * H);
    return;
  }
  read_bytes(b->cell, item->cell, start, rows, L * H);
  const uint16_t *from = item->cell_scale + (size_t)start * L;
  for (int layer = 0; layer < L; layer++) {
    vec *scales = b->scales + layer * W;
    for (int r = 0; r < BLOCK; r++) ((float *)scales)[r] = r < rows ? from_bfloat16(from[(size_t)r * L + layer]) : 0.0f;
    for (int unit = 0; unit < H; unit++)
      UNROLL for (int v = 0; v < W; v++) b->cell[(layer * H + unit) * W + v] *= scales[v];
  }
}

/* Of `next`, already held where not active: what was held is a multiple of 1/127 and comes back as it was. */
INLINE void write_hiddens(block_buffers *b, const struct rule *rule, const struct item *item, int64_t start, int rows) {
  const int width = rule->layers * rule->hidden;
  const float magic = 12582912.0f; /* adding it rounds to an integer */
  if (item->memory_type != INT8) {
    write_memory(item->hidden, item->memory_type, start, rows, width, b->next);
    return;
  }
  for (int i = 0; i < width * W; i++) b->next[i] = b->next[i] * 127.0f + magic - magic;
  write_bytes(item->hidden, start, rows, width, b->next);
}

/* A held cell is a multiple of its old scale and comes back as it was: no noise is added to it. */
INLINE void write_cells(block_buffers *b, const struct rule *rule, const struct item *item, int64_t start, int rows) {
  const int L = rule->layers, H = rule->hidden;
  if (item->memory_type != INT8) {
    write_memory(item->cell, item->memory_type, start, rows, L * H, b->cell);
    return;
  }
  uint16_t *to = item->cell_scale + (size_t)start * L;
  for (int layer = 0; layer < L; layer++) {
    vec *scales = b->scales + layer * W, *cells = b->cell + layer * H * W;
    for (int v = 0; v < W; v++) {
      vec peak = splat(0.0f);
      for (int unit = 0; unit < H; unit++) peak = max_vec(abs_vec(cells[unit * W + v]), peak);
      vec above = (vec)(((uvec)(peak / 127.0f) + 0xffff) & 0xffff0000u);
      vec scale = scales[v] = select_vec(b->active[v], above, scales[v]);
      vec divisor = select_vec(scale > 0.0f, scale, splat(1.0f));
      for (int unit = 0; unit < H; unit++) {
        uvec bits = draw(b, layer * H + unit, v) & (uvec)b->active[v];
        vec noise = __builtin_convertvector((ivec)bits, vec) * (1.0f / 65536.0f);
        cells[unit * W + v] = clamp_vec(floor_vec(cells[unit * W + v] / divisor + noise), -127.0f, 127.0f);
      }
    }
    for (int r = 0; r < rows; r++) to[(size_t)r * L + layer] = (uint16_t)(float_to_bits(((float *)scales)[r]) >> 16);
  }
  write_bytes(item->cell, start, rows, L * H, b->cell);
}

/* torch.lerp(value, moment, decay), in the form that torch takes on either side of 1/2. */
INLINE vec decay_moment(vec moment, vec value, float decay) {
  if (decay < 0.5f) return value + decay * (moment - value);
  return moment + (decay - 1.0f) * (moment - value);
}

/* Moments, inputs, context and active mask of the Adam-modulation rule; the moments are written. */
INLINE void encode_adam(block_buffers *b, const struct rule *rule, const struct item *item, int64_t start, int rows) {
  float staging[3][BLOCK] __attribute__((aligned(64)));
  const float *old[3];
  vec new[3][W], squared[W];
  for (int i = 0; i < 3; i++) old[i] = read_values(item->moments[i], item->moment_types[i], start, rows, staging[i]);
  for (int v = 0; v < W; v++) {
    vec fast = load_vec(old[0] + v * LANES), slow = load_vec(old[1] + v * LANES), second = load_vec(old[2] + v * LANES);
    vec grad = b->grad[v];
    ivec finite = grad * grad <= FLT_MAX; /* a second moment of Inf would never recover */
    grad = select_vec(finite, grad, splat(0.0f));
    if (rule->outlier_bound != 0.0f) {
      const vec bound = rule->outlier_bound * sqrt_vec(second * item->corrections[2]);
      grad = select_vec(second > 0.0f, max_vec(-bound, min_vec(bound, grad)), grad);
    }
    const vec square = grad * grad;
    fast = new[0][v] = select_vec(finite, decay_moment(fast, grad, rule->fast_decay), fast);
    slow = new[1][v] = select_vec(finite, decay_moment(slow, grad, rule->slow_decay), slow);
    second = new[2][v] = select_vec(finite, decay_moment(second, square, rule->second_moment_decay), second);
    ivec active = b->active[v] = finite & (second > 0.0f);

    vec inverse_root = inverse_sqrt_vec(select_vec(active, second * item->corrections[2], splat(1.0f)));
    vec normalised = grad * inverse_root;
    fast = fast * item->corrections[0] * inverse_root;
    b->inputs[v] = clamp_vec(normalised, -5.0f, 5.0f);
    b->inputs[W + v] = fast;
    b->inputs[2 * W + v] = slow * item->corrections[1] * inverse_root;
    squared[v] = normalised * normalised + 1e-8f;
    b->context[0][v] = fast;
    b->context[1][v] = select_vec(active, splat(-rule->step_size * item->scale), splat(0.0f));
  }
  /* On its own: the long chains of the vectors run side by side. */
  UNROLL for (int v = 0; v < W; v++) b->inputs[3 * W + v] = 0.1f * log_normal_vec(squared[v]);
  for (int i = 0; i < 3; i++) {
    if (item->moment_types[i] == BFLOAT16)
      for (int v = 0; v < W; v++) new[i][v] = round_moment(b, new[i][v], rule->layers * rule->hidden + i, v);
    write_values(item->moments[i], item->moment_types[i], start, rows, new[i]);
  }
}

/* Inputs, context and active mask of the paper's rules. Whoever was ever active has a bottom cell that is not zero. */
INLINE void encode_paper(block_buffers *b, const struct rule *rule) {
  for (int v = 0; v < W; v++) {
    vec grad = b->grad[v];
    ivec finite = abs_vec(grad) <= FLT_MAX;
    grad = select_vec(finite, grad, splat(0.0f));
    ivec seen = grad != 0.0f;
    for (int i = 0; i < rule->hidden; i++) seen |= b->cell[i * W + v] != 0.0f;
    b->active[v] = finite & seen;
    if (rule->log_and_sign) {
      vec size = max_vec(splat(rule->threshold), abs_vec(grad));
      b->inputs[v] = log_vec(size) / rule->preprocess_p;
      b->inputs[W + v] = clamp_vec(grad / rule->threshold, -1.0f, 1.0f);
    } else {
      b->inputs[v] = grad * rule->input_scale;
    }
    b->context[0][v] = select_vec(b->active[v], splat(rule->output_scale), splat(0.0f));
  }
}

/* Sums of one unit's four gates, for GROUP vectors of coordinates. */
INLINE const float *add_products(vec acc[4][GROUP], const vec *x, int count, const float *w) {
  for (const float *end = w + 4 * count; w < end; w += 4, x += W)
    UNROLL for (int g = 0; g < 4; g++)
      UNROLL for (int v = 0; v < GROUP; v++) acc[g][v] += w[g] * x[v];
  return w;
}

/* From gates, those of the sigmoids as denominators, and cells, `old`, to what the cells would be, `fresh`, and what is `kept`
 * of them: with a mask, by vector of the block, only where it is set. Short chains of dependent operations in passes of
 * their own: in one they would be too long for a processor to look past. One division for the cell, one for the hidden
 * state, over common denominators. */
INLINE void squash_cells(vec *const gates[4], const float *old, vec *fresh, vec *kept, const ivec *mask, int count) {
  for (int first = 0; first < count; first += W)
    UNROLL for (int v = 0; v < W; v++) {
      const int i = first + v;
      const vec cell = load_vec(old + i * LANES);
      vec denominator, candidate = tanh_parts(gates[CANDIDATE][i], &denominator);
      denominator *= gates[WRITE][i];
      fresh[i] = quotient_vec(cell * denominator + candidate * gates[FORGET][i], gates[FORGET][i] * denominator);
      kept[i] = mask ? select_vec(mask[v], fresh[i], cell) : fresh[i];
    }
}

/* From cells to hidden states, in place. */
INLINE void squash_hiddens(vec *const gates[4], vec *next, int count) {
  for (int i = 0; i < count; i++) {
    vec denominator, squashed = tanh_parts(next[i], &denominator);
    next[i] = quotient_vec(squashed, gates[READ][i] * denominator);
  }
}

/* Ask for memory of the next block while there is arithmetic to do, a share with each unit: all at once would be more than a
 * core can have on its way. */
INLINE void fetch_share(const block_buffers *b, int unit) {
  fetch(b->ahead.hidden + unit * b->ahead.share, b->ahead.share);
  fetch(b->ahead.cell + unit * b->ahead.share, b->ahead.share);
}

/* Every layer: from inputs, hidden and cell to next (the hidden state as it would be) and cell, held where not active. */
INLINE void run_lstm(block_buffers *b, const struct rule *rule, const float *weights) {
  const int H = rule->hidden;
  const vec *below = b->inputs;
  int below_size = encoded_inputs(rule);
  for (int layer = 0; layer < rule->layers; layer++) {
    const float *bias = layer ? weights : b->bias, *row = weights + 4 * H * (layer ? 1 : 1 + rule->num_times);
    const vec *hidden = b->hidden + layer * H * W;
    vec *cell = b->cell + layer * H * W, *next = b->next + layer * H * W;
    vec *const gates[4] = {b->gates, b->gates + H * W, b->gates + 2 * H * W, b->gates + 3 * H * W};
    for (int unit = 0; unit < H; unit++, bias += 4, row += 4 * (below_size + H)) {
      fetch_share(b, layer * H + unit);
      for (int first = 0; first < W; first += GROUP) {
        vec acc[4][GROUP];
        UNROLL for (int g = 0; g < 4; g++)
          UNROLL for (int v = 0; v < GROUP; v++) acc[g][v] = splat(bias[g]);
        add_products(acc, hidden + first, H, add_products(acc, below + first, below_size, row));
        UNROLL for (int g = 0; g < 4; g++)
          UNROLL for (int v = 0; v < GROUP; v++)
            gates[g][unit * W + first + v] = SQUASH_AT_ONCE && g < CANDIDATE ? 1.0f + exp2_vec(acc[g][v]) : acc[g][v];
      }
    }
    if (!SQUASH_AT_ONCE)
      for (int i = 0; i < 3 * H * W; i++) gates[0][i] = 1.0f + exp2_vec(gates[0][i]);
    squash_cells(gates, (const float *)cell, next, cell, b->active, H * W);
    squash_hiddens(gates, next, H * W);
    weights = row;
    below = next;
    below_size = H;
  }
}

INLINE vec read_out(const vec *hidden, const float *weights, int H) {
  vec sum = splat(weights[H]);
  for (int k = 0; k < H; k++) sum += weights[k] * hidden[k * W];
  return sum;
}

/* `top`: [unit][coordinate] */
INLINE void decode_block(block_buffers *b, const struct rule *rule, const float *readout, const vec *top, int H) {
  if (rule->family == PAPER) {
    for (int v = 0; v < W; v++) b->update[v] = read_out(top + v, readout, H) * b->context[0][v];
    return;
  }
  /* Stage by stage, so that the vectors' chains of operations run side by side. */
  vec magnitude[W], direction[W];
  UNROLL for (int v = 0; v < W; v++) magnitude[v] = splat(readout[H]), direction[v] = splat(readout[2 * H + 1]);
  for (int k = 0; k < H; k++)
    UNROLL for (int v = 0; v < W; v++) {
      magnitude[v] += readout[k] * top[k * W + v];
      direction[v] += readout[H + 1 + k] * top[k * W + v];
    }
  const float inverse_gain = 1.0f / rule->log_gain;
  UNROLL for (int v = 0; v < W; v++) magnitude[v] = rule->log_gain * tanh_vec(magnitude[v] * inverse_gain);
  UNROLL for (int v = 0; v < W; v++) direction[v] = b->context[0][v] + tanh_vec(direction[v]);
  UNROLL for (int v = 0; v < W; v++) b->update[v] = b->context[1][v] * exp_vec(magnitude[v]) * direction[v];
}

/* ---- an LSTM of one layer whose units fill a vector ------------------------------------------------------------------------
 *
 * A coordinate's memory is a vector as it lies, so nothing need be turned but what the readout sees; the same arithmetic with
 * units instead of coordinates side by side. */

/* Weights [unit][column][gate] to [column][gate][unit]. */
INLINE void turn_weights(vec *to, const float *weights, int columns) {
  for (int unit = 0; unit < LANES; unit++)
    for (int i = 0; i < 4 * columns; i++) ((float *)to)[i * LANES + unit] = weights[unit * 4 * columns + i];
}

/* `rows` rows of LANES numbers as floats: in place where they are floats and fill the block, else in `staging`. */
INLINE const float *read_rows(vec *staging, const void *memory, int type, int64_t start, int rows) {
  const float *floats = (const float *)memory + start * LANES;
  const uint16_t *halves = (const uint16_t *)memory + start * LANES;
  if (type == FLOAT32 && rows == BLOCK) return floats;
  for (int r = 0; r < BLOCK; r++) staging[r] = splat(0.0f);
  if (type == FLOAT32)
    for (int r = 0; r < rows; r++) staging[r] = load_vec(floats + r * LANES);
  else
    for (int r = 0; r < rows; r++) staging[r] = widen(halves + r * LANES);
  return (const float *)staging;
}

/* Of all rows, or of those that are active. */
INLINE void write_rows(void *memory, int type, int64_t start, int rows, const ivec *active, const vec *from) {
  float *floats = (float *)memory + start * LANES;
  uint16_t *halves = (uint16_t *)memory + start * LANES;
  if (active) {
    for (int r = 0; r < rows; r++) {
      if (!((const int32_t *)active)[r]) continue;
      if (type == FLOAT32)
        store_vec(floats + r * LANES, from[r]);
      else
        narrow(halves + r * LANES, from[r]);
    }
  } else if (type == FLOAT32) {
    for (int r = 0; r < rows; r++) store_vec(floats + r * LANES, from[r]);
  } else {
    for (int r = 0; r < rows; r++) narrow(halves + r * LANES, from[r]);
  }
}

/* Gates of two coordinates, as many sums as hide the latency of a multiply-add; those of the sigmoids as denominators: their
 * exponentials run beside the products of the next two. */
#define PAIR 2
INLINE void multiply_pair(const vec *w, const float *inputs, const float *hidden, vec *const gates[4], int at) {
  vec acc[4][PAIR];
  UNROLL for (int g = 0; g < 4; g++, w++)
    UNROLL for (int j = 0; j < PAIR; j++) acc[g][j] = *w;
  UNROLL for (int k = 0; k < 4; k++)
    UNROLL for (int g = 0; g < 4; g++, w++)
      UNROLL for (int j = 0; j < PAIR; j++) acc[g][j] += *w * splat(inputs[k * BLOCK + j]);
  UNROLL for (int k = 0; k < LANES; k++)
    UNROLL for (int g = 0; g < 4; g++, w++)
      UNROLL for (int j = 0; j < PAIR; j++) acc[g][j] += *w * splat(hidden[j * LANES + k]);
  UNROLL for (int g = 0; g < 4; g++)
    UNROLL for (int j = 0; j < PAIR; j++) gates[g][at + j] = g < CANDIDATE ? 1.0f + exp2_vec(acc[g][j]) : acc[g][j];
}

/* From inputs, and memory where it lies, to the update and new memory. */
INLINE void step_rows(block_buffers *b, const struct rule *rule, const float *weights, const struct item *item,
                      int64_t start, int rows, int all_active) {
  const int type = item->memory_type;
  const float *hidden = read_rows(b->hidden, item->hidden, type, start, rows), *inputs = (const float *)b->inputs;
  const float *cell = read_rows(b->cell, item->cell, type, start, rows);
  vec *const gates[4] = {b->gates, b->gates + BLOCK, b->gates + 2 * BLOCK, b->gates + 3 * BLOCK};
  for (int r = 0; r < BLOCK; r += PAIR) {
    multiply_pair(b->turned, inputs + r, hidden + r * LANES, gates, r);
    if (r % W == 0) fetch_share(b, r / W); /* there are W coordinates for each unit */
  }
  const ivec *mask = all_active ? NULL : b->active;
  squash_cells(gates, cell, b->next, b->cell, NULL, BLOCK);
  squash_hiddens(gates, b->next, BLOCK);
  write_rows(item->cell, type, start, rows, mask, b->cell);
  write_rows(item->hidden, type, start, rows, mask, b->next);
  read_memory(b->gates, b->next, FLOAT32, 0, BLOCK, LANES);
  decode_block(b, rule, readout_weights(rule, weights), b->gates, LANES);
}

INLINE void step_block(block_buffers *b, const struct rule *rule, const float *weights, const struct item *item,
                       int64_t start, int rows) {
  const int width = rule->layers * rule->hidden;
  float staging[BLOCK] __attribute__((aligned(64)));
  const float *grads = read_values(item->grad, item->grad_type, start, rows, staging);
  if (rounds(rule, item)) hash_gradients(b, grads, item->step);
  for (int v = 0; v < W; v++) {
    vec grad = load_vec(grads + v * LANES);
    b->grad[v] = item->maximize ? -grad : grad;
  }
  if (rule->family == PAPER) {
    read_cells(b, rule, item, start, rows);
    encode_paper(b, rule);
  } else {
    encode_adam(b, rule, item, start, rows);
  }
  ivec any = b->active[0], all = b->active[0];
  for (int v = 1; v < W; v++) any |= b->active[v], all &= b->active[v];

  /* A block at rest (an embedding's rows that no batch has touched) costs no LSTM and no memory traffic. */
  if (any_lane(any) && in_rows(rule, item->memory_type)) {
    step_rows(b, rule, weights, item, start, rows, all_lanes(all));
  } else if (any_lane(any)) {
    read_hiddens(b, rule, item, start, rows);
    if (rule->family != PAPER) read_cells(b, rule, item, start, rows);
    run_lstm(b, rule, weights);
    decode_block(b, rule, readout_weights(rule, weights), b->next + (size_t)(rule->layers - 1) * rule->hidden * W,
                 rule->hidden);
    if (!all_lanes(all))
      for (int i = 0; i < width; i++)
        for (int v = 0; v < W; v++)
          b->next[i * W + v] = select_vec(b->active[v], b->next[i * W + v], b->hidden[i * W + v]);
    write_hiddens(b, rule, item, start, rows);
    write_cells(b, rule, item, start, rows);
  } else {
    for (int v = 0; v < W; v++) b->update[v] = splat(0.0f);
  }

  if (item->update) {
    memcpy(item->update + start, b->update, sizeof(float) * rows);
    return;
  }
  const float *params = read_values(item->param, item->param_type, start, rows, staging);
  for (int v = 0; v < W; v++) b->update[v] = load_vec(params + v * LANES) * item->shrink + item->lr * b->update[v];
  write_values(item->param, item->param_type, start, rows, b->update);
}

/* Ask for the first block of the next item: processors follow along one tensor, but do not guess where the next one lies. */
INLINE void fetch_item(const struct rule *rule, const struct columns *columns, int64_t i) {
  const size_t size = (size_t)columns->sizes[i], rows = size < BLOCK ? size : BLOCK;
  FETCH(columns->steps[i]);
  fetch(columns->grads[i], rows * bytes_of(columns->grad_types[i]));
  fetch(columns->params[i], (taken_whole(columns->sizes[i]) ? size : rows) * bytes_of(columns->param_types[i]));
  if (rule->family == ADAM_MODULATION)
    for (int k = 0; k < 3; k++) fetch(columns->moments[k][i], rows * bytes_of(columns->moment_types[k][i]));
}

/* Say where the memory of the block after `block` lies: in the same item, in the next, or nowhere. */
INLINE void look_ahead(block_buffers *b, const struct rule *rule, const struct columns *columns, int64_t i, int64_t block) {
  int64_t start = (block + 1) * BLOCK;
  if (start >= columns->sizes[i]) start = 0, i++;
  b->ahead.hidden = b->ahead.cell = NULL, b->ahead.share = 0;
  if (i == columns->count) return;
  const int64_t left = columns->sizes[i] - start;
  const size_t row = (size_t)(rule->layers * rule->hidden) * bytes_of(columns->memory_types[i]);
  b->ahead.hidden = (const char *)columns->hidden[i] + start * row;
  b->ahead.cell = (const char *)columns->cell[i] + start * row;
  b->ahead.share = (left < BLOCK ? (size_t)left : BLOCK) * bytes_of(columns->memory_types[i]);
}

/* In float64, as the reference has it: whichever of them measures a tensor, the scale is the same to the last bit. */
static double sum_of_squares(const void *values, int type, int64_t start, int64_t count) {
  double sums[BLOCK] = {0};
  float staging[BLOCK] __attribute__((aligned(64)));
  for (int64_t i = 0; i < count; i += BLOCK) {
    const float *x = read_values(values, type, start + i, count - i < BLOCK ? (int)(count - i) : BLOCK, staging);
    for (int j = 0; j < BLOCK; j++) sums[j] += (double)x[j] * (double)x[j];
  }
  for (int half = BLOCK / 2; half; half /= 2)
    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
  return sums[0];
}

static double sum_of(const float *values, int64_t count) {
  double sums[BLOCK] = {0};
  int64_t i = 0;
  for (; i + BLOCK <= count; i += BLOCK)
    for (int j = 0; j < BLOCK; j++) sums[j] += (double)values[i + j];
  for (int j = 0; i < count; i++, j++) sums[j] += (double)values[i];
  for (int half = BLOCK / 2; half; half /= 2)
    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
  return sums[0];
}

/* Over `count` coordinates of a tensor: what its scale is made of. */
static struct sums sums_of(const struct rule *rule, const struct columns *columns, int64_t i, int64_t start, int64_t count) {
  struct sums sums = {sum_of_squares(columns->params[i], columns->param_types[i], start, count), 0.0, 0.0};
  if (rule->agreement_gain != 0.0) {
    sums.momenta = sum_of_squares(columns->moments[1][i], columns->moment_types[1][i], start, count);
    sums.second_moments = sum_of((const float *)columns->moments[2][i] + start, count);
  }
  return sums;
}

/* What comes before the step of an item that this thread takes whole. */
static void count_and_measure(const struct rule *rule, const struct columns *columns, int64_t i) {
  const int64_t size = columns->sizes[i];
  if (columns->measure)
    *columns->scales[i] = scale_of(rule, sums_of(rule, columns, i, 0, size), size, *columns->steps[i]);
  if (columns->count_step) *columns->steps[i] += 1.0f;
}

/* The blocks `first` to `last`, counted over all items in order; 1 when out of memory. */
static int step_items(const struct rule *rule, const float *weights, const struct columns *columns, int64_t first,
                      int64_t last) {
  void *scratch = NULL;
  if (posix_memalign(&scratch, 64, vectors_needed(rule) * sizeof(vec))) return 1;
  block_buffers buffers;
  lay_out_buffers(&buffers, scratch, rule);
  if (in_rows(rule, FLOAT32)) turn_weights(buffers.turned + 4, weights + 4 * LANES * (1 + rule->num_times), 4 + LANES);
  struct item item = {.step = -1.0f};
  for (int64_t i = 0; first < last; i++) {
    int64_t size = columns->sizes[i], blocks = (size + BLOCK - 1) / BLOCK;
    if (first < blocks) {
      float step = item.step;
      if (taken_whole(size)) count_and_measure(rule, columns, i);
      prepare_item(&item, rule, columns, i);
      if (item.step != step) {
        fold_time(buffers.bias, rule, weights, item.step);
        if (in_rows(rule, FLOAT32)) turn_weights(buffers.turned, buffers.bias, 1);
      }
      for (int64_t block = first; block < blocks && block < last; block++) {
        int64_t start = block * BLOCK;
        if (block + 1 == blocks && i + 1 < columns->count) fetch_item(rule, columns, i + 1);
        look_ahead(&buffers, rule, columns, i, block);
        step_block(&buffers, rule, weights, &item, start, size - start < BLOCK ? (int)(size - start) : BLOCK);
      }
    }
    /* Count from the next item's first block. */
    first = first < blocks ? 0 : first - blocks;
    last -= blocks;
  }
  free(scratch);
  return 0;
}

/* Where a share begins: at `block`, or before the small item that this would cut. */
static int64_t share_start(const struct columns *columns, int64_t block) {
  int64_t start = 0;
  for (int64_t i = 0; i < columns->count; i++) {
    int64_t blocks = (columns->sizes[i] + BLOCK - 1) / BLOCK;
    if (block < start + blocks) return taken_whole(columns->sizes[i]) ? start : block;
    start += blocks;
  }
  return start;
}

/* Every block, shared among threads in contiguous runs. Coordinates are independent: the split changes no result. */
static int step_all(const struct rule *rule, const float *weights, const struct columns *columns, int threads) {
  int64_t blocks = 0, coordinates = 0;
  for (int64_t i = 0; i < columns->count; i++) {
    blocks += (columns->sizes[i] + BLOCK - 1) / BLOCK;
    coordinates += columns->sizes[i];
  }
  threads = useful_threads(threads, coordinates);
  int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1) reduction(| : failed)
  for (int share = 0; share < threads; share++) {
    int64_t first = share_start(columns, blocks * share / threads);
    failed |= step_items(rule, weights, columns, first, share_start(columns, blocks * (share + 1) / threads));
  }
  return failed;
}

/* For tests: one of the functions above over an array. */
static void evaluate(int function, int64_t count, const float *x, float *y) {
  for (int64_t i = 0; i < count; i += LANES) {
    float staging[LANES] = {0};
    size_t bytes = sizeof(float) * (size_t)(count - i < LANES ? count - i : LANES);
    memcpy(staging, x + i, bytes);
    vec value = load_vec(staging);
    if (function == 0) value = tanh_vec(value);
    if (function == 1) value = 1.0f / (1.0f + exp2_vec(value * -1.44269504f));
    if (function == 2) value = exp_vec(value);
    if (function == 3) value = log_vec(value);
    memcpy(y + i, &value, bytes);
  }
}

#undef BLOCK
#undef W
#undef GROUP
#undef SQUASH_AT_ONCE
#undef PAIR
#undef TILE
#undef SHUFFLE_PARTS
#undef JOIN_ROWS
#undef SPLIT_ROWS
#undef LANES
#undef SUFFIX
#undef ISA_AVX2
#undef ISA_AVX512
