/* How numbers are stored: types by number, and 16-bit floats in integers, so that every compiler can vectorise them. */
#include <stdint.h>
#include <string.h>

#define HELPER static inline __attribute__((always_inline, unused))

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

HELPER float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HELPER uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

HELPER float from_bfloat16(uint16_t half) { return bits_to_float((uint32_t)half << 16); }

HELPER uint16_t to_bfloat16(float x) {
  uint32_t bits = float_to_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

HELPER float from_float16(uint16_t half) {
  uint32_t size = half & 0x7fff, normal = (size << 13) + (112u << 23);
  uint32_t bits = size >= 0x7c00 ? normal + (112u << 23) : normal;
  uint32_t small = float_to_bits((float)(int32_t)size * 5.9604644775390625e-8f); /* subnormal: multiples of 2^-24 */
  return bits_to_float((size < 0x400 ? small : bits) | (uint32_t)(half & 0x8000) << 16);
}

HELPER uint16_t to_float16(float x) {
  uint32_t bits = float_to_bits(x), size = bits & 0x7fffffff;
  uint32_t normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  uint32_t small = float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000; /* the addition rounds to multiples of 2^-24 */
  uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  uint32_t half = size < 0x38800000 ? small : size >= 0x47800000 ? large : normal;
  return (uint16_t)(half | (bits >> 16 & 0x8000));
}
