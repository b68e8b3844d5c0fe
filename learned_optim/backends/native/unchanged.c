/* Do all tensors still lie where they lay at the last step?
 *
 * Asking each tensor from Python costs more than a step of a small one. torch's and Python's own stable C functions are
 * handed in by address, so that neither's headers are needed. Call with the interpreter's lock held.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* torch's functions (aoti_torch_...) return 0 unless they fail; a handle points to a tensor, which is one pointer. */
struct functions {
  int32_t (*get_layout)(void *const *tensor, int32_t *layout);
  int32_t (*get_device_type)(void *const *tensor, int32_t *type);
  int32_t (*get_dtype)(void *const *tensor, int32_t *dtype);
  int32_t (*get_numel)(void *const *tensor, int64_t *numel);
  int32_t (*is_contiguous)(void *const *tensor, bool *contiguous);
  int32_t (*get_data_ptr)(void *const *tensor, void **data);
  int (*dict_next)(void *dict, ptrdiff_t *position, void **key, void **value);
};

/* Whether a dict of dicts holds these very objects, in this order. */
int learned_optim_holds(const struct functions *call, void *outer, int64_t count, void *const *objects) {
  int64_t found = 0;
  void *key, *inner, *object;
  for (ptrdiff_t i = 0; call->dict_next(outer, &i, &key, &inner);)
    for (ptrdiff_t j = 0; call->dict_next(inner, &j, &key, &object); found++)
      if (found == count || objects[found] != object) return 0;
  return found == count;
}

/* Whether the tensors still have these addresses. */
int learned_optim_in_place(const struct functions *call, int64_t count, void *const *tensors, void *const *addresses) {
  void *data;
  for (int64_t i = 0; i < count; i++)
    if (call->get_data_ptr(tensors + i, &data) || data != addresses[i]) return 0;
  return 1;
}

/* Whether the tensors are plain memory of these sizes and dtypes, and where. */
int learned_optim_locate(const struct functions *call, int64_t count, void *const *tensors, const int64_t *sizes,
                         const int32_t *dtypes, void **addresses) {
  for (int64_t i = 0; i < count; i++) {
    int32_t layout, device, dtype;
    int64_t numel;
    bool contiguous;
    if (call->get_layout(tensors + i, &layout) || layout != 0) return 0; /* strided */
    if (call->get_device_type(tensors + i, &device) || device != 0) return 0; /* CPU */
    if (call->get_dtype(tensors + i, &dtype) || dtype != dtypes[i]) return 0;
    if (call->get_numel(tensors + i, &numel) || numel != sizes[i]) return 0;
    if (call->is_contiguous(tensors + i, &contiguous) || !contiguous) return 0;
    if (call->get_data_ptr(tensors + i, addresses + i)) return 0;
  }
  return 1;
}
