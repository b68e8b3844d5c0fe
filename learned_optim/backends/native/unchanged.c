/* Do all tensors still lie where they lay at the last step, and where do the new gradients lie?
 *
 * Asking each tensor from Python costs more than a step of a small one. torch's and Python's own functions are handed in by
 * address, so that neither's headers are needed. Call with the interpreter's lock held; no reference is taken, so that
 * threads may share the work.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "threads.h"

/* A handle points to a tensor, which is one pointer. The functions of torch's C interface return 0 unless they fail. */
struct functions {
  int32_t (*get_layout)(void *const *tensor, int32_t *layout);
  int32_t (*get_device_type)(void *const *tensor, int32_t *type);
  int32_t (*get_dtype)(void *const *tensor, int32_t *dtype);
  int32_t (*get_numel)(void *const *tensor, int64_t *numel);
  int32_t (*get_dim)(void *const *tensor, int64_t *dim);
  int32_t (*get_sizes)(void *const *tensor, int64_t **sizes);
  int32_t (*is_contiguous)(void *const *tensor, bool *contiguous);
  int32_t (*get_data_ptr)(void *const *tensor, void **data);
  void *const *(*get_grad)(void *tensor);
  bool (*is_neg)(void *const *tensor);
  bool (*is_inference)(void *const *tensor);
  void (*bump_version)(void *const *tensor);
  int (*dict_next)(void *dict, ptrdiff_t *position, void **key, void **value);
  void *(*list_item)(void *list, ptrdiff_t index);
};

/* How this torch lays out what none of its functions tell without making an object of Python: which word of a tensor's
 * object points to the tensor, and which to its type; which word of a tensor points to its object, if it ever had one. */
struct words {
  int64_t tensor_of_object, type_of_object, object_of_tensor;
  void *plain[2]; /* types of plain tensors */
  void *absent;   /* the tensor that stands for no gradient */
};

/* What was found at the last step. Mirrored by native_plan.py. */
struct found {
  int64_t params;
  void *const *objects, *const *tensors; /* of every parameter, in Python and in torch */
  const int64_t *rows;                   /* of every parameter in the table of the kernel, or -1: it has no gradient */
  const int64_t *sizes;                  /* of every row, of parameter and gradient */
  const int32_t *dtypes;                 /* likewise */
  const int64_t *shapes, *ends;          /* of the parameter of every row, one after another, and where each ends */
  void **param_addresses, **grad_addresses; /* of every row: written */
  int64_t kept;
  void *const *kept_objects, *const *kept_tensors, *const *kept_addresses; /* of all memory and step counts */
  void *const *kept_storages; /* only to fetch them ahead of use */
};

/* What the optimizer's state, a dict of dicts, held at the last step. Mirrored by native_plan.py. */
struct held {
  int64_t count;
  void *const *params; /* key, value, key, value: parameters and their dicts */
  const int64_t *ends; /* of each dict's part of the entries */
  void *const *entries; /* key, value, key, value */
};

/* Thousands of tensors lie in as many pages: waiting for one after the other is most of the time it takes to look at them. */
#ifdef __GNUC__
#define FETCH(address) __builtin_prefetch(address)
#else
#define FETCH(address) ((void)0)
#endif
enum { AHEAD = 8 };

static void fetch(const char *tensor) {
  for (int line = 0; line < 4; line++) FETCH(tensor + 64 * line);
}

static int holds_all(const struct functions *call, void *dict, int64_t count, void *const *entries) {
  int64_t found = 0;
  void *key, *value;
  for (ptrdiff_t i = 0; call->dict_next(dict, &i, &key, &value); found++)
    if (found == count || entries[2 * found] != key || entries[2 * found + 1] != value) return 0;
  return found == count;
}

/* Whether a dict holds the same dicts, and each of them the same entries, in this order. */
int learned_optim_holds(const struct functions *call, const struct held *held, void *outer, int threads) {
  if (!holds_all(call, outer, held->count, held->params)) return 0;
  int other = 0;
  threads = useful_threads(threads, held->count ? held->ends[held->count - 1] : 0);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(| : other)
  for (int64_t i = 0; i < held->count; i++) {
    int64_t start = i ? held->ends[i - 1] : 0;
    if (i + AHEAD < held->count) FETCH(held->params[2 * (i + AHEAD) + 1]);
    other |= !holds_all(call, held->params[2 * i + 1], held->ends[i] - start, held->entries + 2 * start);
  }
  return !other;
}

/* Whether a tensor is plain memory of this size and dtype, and where: one that stands for zeros may have none. */
static int locate(const struct functions *call, void *const *tensor, int64_t size, int32_t dtype_wanted, void **address) {
  int32_t layout, device, dtype;
  int64_t numel;
  bool contiguous;
  if (call->get_layout(tensor, &layout) || layout != 0) return 0; /* strided */
  if (call->get_device_type(tensor, &device) || device != 0) return 0; /* CPU */
  if (call->get_dtype(tensor, &dtype) || dtype != dtype_wanted) return 0;
  if (call->get_numel(tensor, &numel) || numel != size) return 0;
  if (call->is_contiguous(tensor, &contiguous) || !contiguous) return 0;
  return !call->is_neg(tensor) && !call->is_inference(tensor) && !call->get_data_ptr(tensor, address) && (*address || !size);
}

/* A tensor's object in Python, or NULL if it never had one. The lowest bits may be flags. */
static void *object_of(const struct words *words, const void *tensor) {
  return (void *)(((const uintptr_t *)tensor)[words->object_of_tensor] & ~(uintptr_t)7);
}

/* Whether a tensor is of no subclass. */
static int is_plain(const struct words *words, const void *tensor) {
  void *const *object = object_of(words, tensor), *type = object ? object[words->type_of_object] : words->plain[0];
  return type == words->plain[0] || type == words->plain[1];
}

static int has_shape(const struct functions *call, void *const *tensor, int64_t dim_wanted, const int64_t *wanted) {
  int64_t dim, *sizes;
  if (call->get_dim(tensor, &dim) || dim != dim_wanted || call->get_sizes(tensor, &sizes)) return 0;
  for (int64_t i = 0; i < dim; i++)
    if (sizes[i] != wanted[i]) return 0;
  return 1;
}

static int find_param(const struct functions *call, const struct words *words, const struct found *found, void *list,
                      int64_t i) {
  void *object = call->list_item(list, i), *const *tensor = found->tensors + i, *const *grad;
  int64_t row = found->rows[i];
  if (i + AHEAD < found->params) {
    FETCH(found->objects[i + AHEAD]);
    fetch(found->tensors[i + AHEAD]);
  }
  if (object != found->objects[i] || ((void *const *)object)[words->tensor_of_object] != *tensor) return 0;
  grad = call->get_grad(*tensor);
  if (row < 0 || *grad == words->absent) return row < 0 && *grad == words->absent;
  int64_t start = row ? found->ends[row - 1] : 0;
  return is_plain(words, *grad) && has_shape(call, tensor, found->ends[row] - start, found->shapes + start) &&
         locate(call, tensor, found->sizes[row], found->dtypes[row], found->param_addresses + row) &&
         locate(call, grad, found->sizes[row], found->dtypes[row], found->grad_addresses + row);
}

static int still_there(const struct functions *call, const struct words *words, const struct found *found, int64_t i) {
  void *address;
  if (i + AHEAD < found->kept) {
    fetch(found->kept_tensors[i + AHEAD]);
    FETCH(found->kept_storages[i + AHEAD]);
  }
  /* Its object is kept alive, but may have been given another tensor. */
  if (object_of(words, found->kept_tensors[i]) != found->kept_objects[i]) return 0;
  return !call->get_data_ptr(found->kept_tensors + i, &address) && address == found->kept_addresses[i];
}

/* Whether a list, of `found->params` entries, holds the same parameters, the same of them have gradients, and everything
 * is plain memory, the optimizer's where it was. */
int learned_optim_find(const struct functions *call, const struct words *words, const struct found *found, void *list,
                       int threads) {
  int missing = 0;
  threads = useful_threads(threads, found->params * 4 + found->kept);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1) reduction(| : missing)
  for (int share = 0; share < threads; share++) {
    int64_t first = found->params * share / threads, last = found->params * (share + 1) / threads;
    for (int64_t i = first; i < last && !missing; i++) missing |= !find_param(call, words, found, list, i);
    first = found->kept * share / threads, last = found->kept * (share + 1) / threads;
    for (int64_t i = first; i < last && !missing; i++) missing |= !still_there(call, words, found, i);
  }
  return !missing;
}

/* Tell autograd that the parameters with a gradient are about to be written. */
void learned_optim_touch(const struct functions *call, const struct found *found, int threads) {
  threads = useful_threads(threads, found->params * 2);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < found->params; i++) {
    if (i + AHEAD < found->params) FETCH(found->tensors[i + AHEAD]);
    if (found->rows[i] >= 0) call->bump_version(found->tensors + i);
  }
}
