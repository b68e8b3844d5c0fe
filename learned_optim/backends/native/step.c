/* The fused inner step on a CPU: every stage of both rule families in one pass over parameters and memory.
 *
 * Plain C with a plain ABI, loaded by ctypes: no torch headers, no build-time dependency but a compiler. The kernel is
 * compiled once for each instruction set and chosen at run time; see step_kernel.h for how it works.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"
#include "threads.h"

enum { PAPER = 0, ADAM_MODULATION = 1 };
enum { WRITE, FORGET, READ, CANDIDATE }; /* gates as the kernel has them: the three sigmoids first */

/* What a rule is, apart from its meta-parameters. Mirrored by step.py. */
struct rule {
  int32_t family, layers, hidden, log_and_sign, num_times;
  float fast_decay, slow_decay, second_moment_decay, outlier_bound, step_size, log_gain;
  float anneal_power, anneal_steps, anneal_start, min_scale, small_min_scale, max_scale;
  double agreement_gain, agreement_floor, agreement_limit, agreement_noise, agreement_decay;
  float input_scale, output_scale, preprocess_p, threshold;
  float time_scales[16];
};

/* What a step reads and writes, one row an item; a pointer is 8 bytes on every machine we know. Mirrored by step.py. */
struct columns {
  int64_t count;
  const int64_t *sizes;
  float *const *updates; /* NULL, or for each item where its update goes instead of into the parameter; NULL: into it */
  void *const *params, *const *grads, *const *hidden, *const *cell, *const *moments[3];
  uint16_t *const *cell_scales; /* for 8-bit memory */
  float *const *steps; /* one number each: inner steps, this one included unless it is still to be counted */
  float *const *scales; /* one number each: tensor_scale, written if `measure` */
  const uint8_t *param_types, *grad_types, *memory_types, *moment_types[3];
  float lr, shrink;
  int32_t maximize, count_step, measure;
};

/* One row of the columns, and what follows from its step. */
struct item {
  void *param, *hidden, *cell, *moments[3];
  const void *grad;
  float *update; /* handed out if not NULL */
  uint16_t *cell_scale;
  int param_type, grad_type, memory_type, moment_types[3], maximize;
  float lr, shrink, step, scale, corrections[3]; /* corrections of the moments' bias */
};

HELPER int encoded_inputs(const struct rule *rule) {
  return rule->family == ADAM_MODULATION ? 4 : rule->log_and_sign ? 2 : 1;
}

HELPER float time_feature(const struct rule *rule, int k, float step) {
  return tanhf(step / rule->time_scales[k] - 1.0f);
}

/* Weights as step.py packs them: for each layer the bias [unit][gate], in the first layer the columns of the features of
 * time [feature][unit][gate], then [unit][inputs, hiddens][gate]; at the end [output][hiddens, bias]. All that belongs to
 * the sigmoids is multiplied by -1/ln 2, because they take powers of two: sigmoid = 1 / (1 + 2^gate). */
HELPER size_t lstm_weights(const struct rule *rule) {
  size_t H = rule->hidden;
  return 4 * H * (1 + rule->num_times + encoded_inputs(rule) + H) + (rule->layers - 1) * 4 * H * (1 + 2 * H);
}

HELPER const float *readout_weights(const struct rule *rule, const float *weights) { return weights + lstm_weights(rule); }

/* Features of time are the same for a whole tensor, so they join its bias. */
static void fold_time(float *bias, const struct rule *rule, const float *weights, float step) {
  size_t size = 4 * (size_t)rule->hidden;
  memcpy(bias, weights, size * sizeof(float));
  for (int k = 0; k < rule->num_times; k++) {
    float feature = time_feature(rule, k, step);
    const float *column = weights + (k + 1) * size;
    for (size_t i = 0; i < size; i++) bias[i] += feature * column[i];
  }
}

/* What was computed from the step of the item before is kept where the step is the same. */
static void prepare_item(struct item *item, const struct rule *rule, const struct columns *columns, int64_t i) {
  const float step = item->step, corrections[3] = {item->corrections[0], item->corrections[1], item->corrections[2]};
  *item = (struct item){
      .param = columns->params[i],
      .grad = columns->grads[i],
      .update = columns->updates ? columns->updates[i] : NULL,
      .hidden = columns->hidden[i],
      .cell = columns->cell[i],
      .param_type = columns->param_types[i],
      .grad_type = columns->grad_types[i],
      .memory_type = columns->memory_types[i],
      .maximize = columns->maximize,
      .lr = columns->lr,
      .shrink = columns->shrink,
      .step = *columns->steps[i],
  };
  if (item->memory_type == INT8) item->cell_scale = columns->cell_scales[i];
  if (rule->family != ADAM_MODULATION) return;
  for (int k = 0; k < 3; k++) item->moments[k] = columns->moments[k][i], item->moment_types[k] = columns->moment_types[k][i];
  item->scale = *columns->scales[i];
  const float since = item->step - rule->anneal_start;
  if (rule->anneal_power != 0.0f && since > 0.0f) item->scale *= powf(1.0f + since / rule->anneal_steps, -rule->anneal_power);
  if (step == item->step) {
    item->corrections[0] = corrections[0], item->corrections[1] = corrections[1], item->corrections[2] = corrections[2];
    return;
  }
  /* In float32 as the reference has it: of 1 - 0.999^t little is left of the digits, and both must lose the same. */
  item->corrections[0] = 1.0f / (1.0f - powf(rule->fast_decay, item->step));
  item->corrections[1] = 1.0f / (1.0f - powf(rule->slow_decay, item->step));
  item->corrections[2] = 1.0f / (1.0f - powf(rule->second_moment_decay, item->step));
}

/* What is summed over a tensor for its scale. */
struct sums {
  double params, momenta, second_moments; /* of squares, of squares, as they are */
};

/* The rule's agreement_factor. `done` inner steps came before. */
HELPER double agreement_factor(const struct rule *rule, struct sums sums, double done) {
  const double corrected = sums.second_moments / (1.0 - pow(rule->agreement_decay, done));
  const double agreement = sqrt(sums.momenta / (corrected * rule->agreement_noise));
  if (!(agreement <= DBL_MAX)) return 1.0;
  const double factor = exp(rule->agreement_gain * (agreement - rule->agreement_floor));
  return factor < 1.0 ? 1.0 : factor > rule->agreement_limit ? rule->agreement_limit : factor;
}

/* The rule's tensor_scale. */
HELPER float scale_of(const struct rule *rule, struct sums sums, int64_t size, double done) {
  double root = sqrt(sums.params / (double)size), small = 0.5 / sqrt(sqrt((double)size));
  if (small > rule->small_min_scale) small = rule->small_min_scale;
  double floor = small < rule->min_scale ? rule->min_scale : small;
  root = root > floor ? root : floor; /* of NaN too */
  root = root > rule->max_scale ? rule->max_scale : root;
  return (float)(rule->agreement_gain ? root * agreement_factor(rule, sums, done) : root);
}

/* Whether a tensor is so small that one thread takes all of it, and counts its step and measures its scale just before:
 * what another thread wrote a moment ago would have to come from that one's cache. */
HELPER int taken_whole(int64_t size) { return size <= 1024; }

HELPER size_t bytes_of(int type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }

#ifdef __GNUC__
#define FETCH(address) __builtin_prefetch(address, 1)
#else
#define FETCH(address) ((void)0)
#endif

/* ---- one kernel for each instruction set ------------------------------------------------------------------------------------ */

#define KERNEL "step_kernel.h"
#include "variants.h"

/* Tests lower the limit to reach each. */
static int isa_limit = 2;

void learned_optim_limit_isa(int limit) { isa_limit = limit; }

int learned_optim_isa(void) {
#ifdef X86_VARIANTS
  if (isa_limit >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (isa_limit >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return 1;
#endif
  return 0;
}

/* ---- what step.py calls ------------------------------------------------------------------------------------------------- */

/* Scales of all tensors that threads may share. Squares are summed in float64 by pieces of fixed size: threads do not change
 * the result. */
static int measure_scales(const struct rule *rule, const struct columns *columns, int threads) {
  enum { PIECE = 32768 };
  const int64_t *sizes = columns->sizes;
  int64_t pieces = 0, coordinates = 0;
  for (int64_t i = 0; i < columns->count; i++)
    if (!taken_whole(sizes[i])) pieces += (sizes[i] + PIECE - 1) / PIECE, coordinates += sizes[i];
  if (!pieces) return 0;
  struct sums *sums = malloc(sizeof(struct sums) * (size_t)pieces);
  if (!sums) return 1;
  threads = useful_threads(threads, coordinates / 16);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
  for (int share = 0; share < threads; share++) {
    int64_t first = pieces * share / threads, last = pieces * (share + 1) / threads, piece = 0;
    for (int64_t i = 0; i < columns->count && piece < last; i++)
      for (int64_t start = 0; start < sizes[i] && !taken_whole(sizes[i]); start += PIECE, piece++)
        if (piece >= first && piece < last) {
          int64_t size = sizes[i] - start < PIECE ? sizes[i] - start : PIECE;
          sums[piece] = DISPATCH(sums_of, rule, columns, i, start, size);
        }
  }
  for (int64_t i = 0, piece = 0; i < columns->count; i++) {
    if (taken_whole(sizes[i])) continue;
    struct sums total = {0.0, 0.0, 0.0};
    for (int64_t start = 0; start < sizes[i]; start += PIECE, piece++) {
      total.params += sums[piece].params;
      total.momenta += sums[piece].momenta;
      total.second_moments += sums[piece].second_moments;
    }
    *columns->scales[i] = scale_of(rule, total, sizes[i], *columns->steps[i]);
  }
  free(sums);
  return 0;
}

/* One inner step of every item, in place. Returns 0, or 1 when out of memory. */
int learned_optim_step(const struct rule *rule, const float *weights, const struct columns *columns, int threads) {
  if (columns->measure && measure_scales(rule, columns, threads)) return 1;
  if (columns->count_step)
    for (int64_t i = 0; i < columns->count; i++)
      if (!columns->sizes[i] || !taken_whole(columns->sizes[i])) *columns->steps[i] += 1.0f;
  return DISPATCH(step_all, rule, weights, columns, threads);
}

/* What was compiled: see library.py. */
const char *learned_optim_sources(void) { return SOURCE_DIGEST; }

/* For tests: tanh 0, sigmoid 1, exp 2, log 3 of an array. */
void learned_optim_evaluate(int function, int64_t count, const float *x, float *y) {
  DISPATCH(evaluate, function, count, x, y);
}
