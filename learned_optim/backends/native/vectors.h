/* Vectors of LANES floats and what the kernels do with them, for one instruction set.
 *
 * Included once for each instruction set, with LANES, SUFFIX and perhaps ISA_AVX2 or ISA_AVX512 set. GCC and Clang vector
 * extensions carry the arithmetic, so the same text serves every processor; intrinsics only where the extensions have no
 * word for an instruction, and always beside a plain form. Not for -ffast-math: NaN and Inf must stay what they are.
 */
#define NAME(base) JOIN(base, SUFFIX)
#define JOIN(base, suffix) JOIN_(base, suffix)
#define JOIN_(base, suffix) base##suffix
#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 16")

/* Every name gets the suffix of its instruction set. Defining a macro twice in the same words is allowed. */
#define vec NAME(vec)
#define ivec NAME(ivec)
#define uvec NAME(uvec)
#define loose_vec NAME(loose_vec)
#define hvec NAME(hvec)
#define loose_hvec NAME(loose_hvec)
#define widen NAME(widen)
#define narrow NAME(narrow)
#define tile NAME(tile)
#define loose_floats NAME(loose_floats)
#define loose_halves NAME(loose_halves)
#define tile_bits NAME(tile_bits)
#define tile_halves NAME(tile_halves)
#define splat NAME(splat)
#define load_vec NAME(load_vec)
#define store_vec NAME(store_vec)
#define select_vec NAME(select_vec)
#define min_vec NAME(min_vec)
#define max_vec NAME(max_vec)
#define clamp_vec NAME(clamp_vec)
#define abs_vec NAME(abs_vec)
#define sqrt_vec NAME(sqrt_vec)
#define inverse_sqrt_vec NAME(inverse_sqrt_vec)
#define floor_vec NAME(floor_vec)
#define quotient_vec NAME(quotient_vec)
#define any_lane NAME(any_lane)
#define all_lanes NAME(all_lanes)
#define exp2_vec NAME(exp2_vec)
#define exp_vec NAME(exp_vec)
#define log_normal_vec NAME(log_normal_vec)
#define log_vec NAME(log_vec)
#define tanh_parts NAME(tanh_parts)
#define tanh_vec NAME(tanh_vec)
#define transpose_tile NAME(transpose_tile)
#define load_tile NAME(load_tile)
#define store_tile NAME(store_tile)
#define unzip_vectors NAME(unzip_vectors)
#define zip_vectors NAME(zip_vectors)
#define load_two_rows NAME(load_two_rows)
#define store_two_rows NAME(store_two_rows)
#define loose_eight NAME(loose_eight)
#define loose_eight_halves NAME(loose_eight_halves)
#define load_eights NAME(load_eights)
#define store_eights NAME(store_eights)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t loose_hvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec load_vec(const float *from) { return *(const loose_vec *)from; }
INLINE void store_vec(float *to, vec x) { *(loose_vec *)to = x; }

/* From bfloat16, and to it: rounded to nearest, ties to even. */
INLINE vec widen(const uint16_t *from) {
  return (vec)(__builtin_convertvector(*(const loose_hvec *)from, uvec) << 16);
}

INLINE void narrow(uint16_t *to, vec x) {
  uvec bits = (uvec)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uvec is_nan = (uvec)((bits & 0x7fffffff) > 0x7f800000);
  *(loose_hvec *)to = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), hvec);
}

/* Where the mask is -1 the first, where it is 0 the second. */
INLINE vec select_vec(ivec mask, vec a, vec b) {
#if defined(ISA_AVX2)
  return (vec)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
  return (vec)(((ivec)a & mask) | ((ivec)b & ~mask));
#endif
}

/* A NaN in the second argument survives. */
INLINE vec min_vec(vec bound, vec x) {
#if defined(ISA_AVX512)
  return (vec)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(ISA_AVX2)
  return (vec)_mm256_min_ps((__m256)bound, (__m256)x);
#elif defined(__SSE2__)
  return (vec)_mm_min_ps((__m128)bound, (__m128)x);
#else
  return select_vec(x > bound, bound, x);
#endif
}

INLINE vec max_vec(vec bound, vec x) {
#if defined(ISA_AVX512)
  return (vec)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(ISA_AVX2)
  return (vec)_mm256_max_ps((__m256)bound, (__m256)x);
#elif defined(__SSE2__)
  return (vec)_mm_max_ps((__m128)bound, (__m128)x);
#else
  return select_vec(x < bound, bound, x);
#endif
}

INLINE vec clamp_vec(vec x, float low, float high) { return min_vec(splat(high), max_vec(splat(low), x)); }
INLINE vec abs_vec(vec x) { return (vec)((ivec)x & 0x7fffffff); }

INLINE vec sqrt_vec(vec x) {
#if defined(ISA_AVX512)
  return (vec)_mm512_sqrt_ps((__m512)x);
#elif defined(ISA_AVX2)
  return (vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vec)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = sqrtf(x[i]);
  return x;
#endif
}

/* 1 / sqrt(x) of a positive number, to two units in the last place. */
INLINE vec inverse_sqrt_vec(vec x) {
#if defined(ISA_AVX512)
  vec guess = (vec)_mm512_rsqrt14_ps((__m512)x);
  return guess + 0.5f * guess * (1.0f - x * guess * guess);
#else
  return 1.0f / sqrt_vec(x);
#endif
}

/* Of numbers that fit in an integer. */
INLINE vec floor_vec(vec x) {
  vec cut = __builtin_convertvector(__builtin_convertvector(x, ivec), vec);
  return cut - select_vec(cut > x, splat(1.0f), splat(0.0f));
}

/* a / b to two units in the last place, where 1 / b is an ordinary number. With AVX-512 a first guess and a step of Newton's
 * cost a fraction of a division. */
INLINE vec quotient_vec(vec a, vec b) {
#if defined(ISA_AVX512)
  vec guess = (vec)_mm512_rcp14_ps((__m512)b);
  return a * (guess + guess * (1.0f - b * guess));
#else
  return a / b;
#endif
}

INLINE int any_lane(ivec mask) {
#if defined(ISA_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(ISA_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < LANES; i++) any |= mask[i];
  return any != 0;
#endif
}

INLINE int all_lanes(ivec mask) { return !any_lane(~mask); }

/* ---- functions: polynomials and rationals fitted to the float32 range, a few units in the last place ------------------ */

/* 2^x, x at most 58: for sigmoids, which divide by 1 + 2^x and multiply two such denominators. */
INLINE vec exp2_vec(vec x) {
#if defined(ISA_AVX512)
  x = min_vec(splat(58.0f), x);
  vec f = (vec)_mm512_reduce_ps((__m512)x, 1); /* x - floor(x) */
  vec p = f * 1.87757769e-3f + 8.98934063e-3f;
  p = p * f + 5.58263175e-2f;
  p = p * f + 2.40153611e-1f;
  p = p * f + 6.93153083e-1f;
  p = p * f + 9.99999940e-1f;
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)x); /* times 2^floor(x) */
#else
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits */
  x = clamp_vec(x, -126.0f, 58.0f);
  vec rounded = x + magic;
  vec f = x - (rounded - magic);
  vec p = f * 1.32764632e-3f + 9.67553919e-3f;
  p = p * f + 5.55071293e-2f;
  p = p * f + 2.40221204e-1f;
  p = p * f + 6.93146967e-1f;
  p = p * f + 1.00000007f;
  return (vec)((ivec)p + ((ivec)rounded << 23));
#endif
}

/* e^x; 0 below -87.3 (where floats lose digits) and Inf above the largest float's logarithm. */
INLINE vec exp_vec(vec x) {
  const float magic = 12582912.0f;
  vec y = clamp_vec(x, -87.3f, 88.7228f);
  vec rounded = y * 1.44269504f + magic;
  vec n = rounded - magic;
  vec r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = r * 1.39013e-3f + 8.36314e-3f;
  p = p * r + 4.166685e-2f;
  p = p * r + 1.6666577e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  p = (vec)((ivec)p + ((ivec)rounded << 23));
  p = select_vec(x < -87.3f, splat(0.0f), p);
  return select_vec(x > 88.7228f, splat(INFINITY), p);
}

/* Natural logarithm of a positive, finite, normal float. */
INLINE vec log_normal_vec(vec x) {
  /* Split into 2^n times a mantissa in [sqrt(1/2), sqrt(2)), so that logarithms near 0 keep their digits. */
  ivec shifted = (ivec)x - 0x3f3504f3;
  vec n = __builtin_convertvector(shifted >> 23, vec);
  vec f = (vec)((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  vec p = f * 7.037678e-2f - 1.1514613e-1f;
  p = p * f + 1.1677002e-1f;
  p = p * f - 1.2420141e-1f;
  p = p * f + 1.4249322e-1f;
  p = p * f - 1.6668058e-1f;
  p = p * f + 2.0000715e-1f;
  p = p * f - 2.4999994e-1f;
  p = p * f + 3.3333331e-1f;
  p = p * f - 0.5f;
  return f * f * p + f + n * 6.93147181e-1f;
}

/* The same of denormal floats too. */
INLINE vec log_vec(vec x) {
  ivec tiny = x < FLT_MIN;
  x = select_vec(tiny, x * 8388608.0f, x); /* times 2^23 */
  return log_normal_vec(x) - select_vec(tiny, splat(15.9423851f), splat(0.0f));
}

/* tanh as a fraction, which callers merge with the denominators of sigmoids; relative error 3e-7, near 0 too. */
INLINE vec tanh_parts(vec x, vec *denominator) {
  x = clamp_vec(x, -8.5f, 8.5f); /* not vrange, which swallows NaN */
  vec s = x * x;
  vec p = s * 1.4269175589e-8f + 2.1251003527e-5f;
  vec q = s * 8.1451010918e-7f + 3.3488606337e-4f;
  p = p * s + 3.5340242556e-3f;
  q = q * s + 2.6022741322e-2f;
  p = p * s + 1.3413244694e-1f;
  q = q * s + 4.6746567426e-1f;
  p = p * s + 9.9999998817e-1f;
  q = q * s + 1.0f;
  *denominator = q;
  return x * p;
}

INLINE vec tanh_vec(vec x) {
  vec denominator, numerator = tanh_parts(x, &denominator);
  return quotient_vec(numerator, denominator);
}

/* ---- transposition: TILE coordinates by four numbers ----------------------------------------------------------------- */

/* Each 128-bit part of a vector holds four numbers of one coordinate; the parts of vector j are coordinates j, j + 4, ... */
#define TILE LANES
typedef float tile __attribute__((vector_size(4 * TILE), aligned(4), may_alias));
typedef uint32_t tile_bits __attribute__((vector_size(4 * TILE)));
typedef uint16_t tile_halves __attribute__((vector_size(2 * TILE)));

/* One row of four numbers wherever it lies. */
typedef float loose_floats __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(8), aligned(2), may_alias));

/* Rows `apart`, to the parts of a vector and back. Registers, not a buffer: reading back what was just written in parts would
 * stall. */
#define JOIN_TWO(type, row, apart) \
  __builtin_shufflevector(*(const type *)(row), *(const type *)((row) + (apart)), 0, 1, 2, 3, 4, 5, 6, 7)
#define PUT_PART(type, vector, part, row) \
  (*(type *)(row) = __builtin_shufflevector(vector, vector, 4 * (part), 4 * (part) + 1, 4 * (part) + 2, 4 * (part) + 3))
#if TILE == 16
#define SHUFFLE_PARTS(a, b, i, j, k, l)                                                                     \
  __builtin_shufflevector(a, b, i, j, k + 12, l + 12, i + 4, j + 4, k + 16, l + 16, i + 8, j + 8, k + 20, \
                          l + 20, i + 12, j + 12, k + 24, l + 24)
#define JOIN_ROWS(type, row, apart)                                                                \
  __builtin_shufflevector(JOIN_TWO(type, row, apart), JOIN_TWO(type, (row) + 2 * (apart), apart), \
                          0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define SPLIT_ROWS(type, vector, row, apart)                                                \
  (PUT_PART(type, vector, 0, row), PUT_PART(type, vector, 1, (row) + (apart)),              \
   PUT_PART(type, vector, 2, (row) + 2 * (apart)), PUT_PART(type, vector, 3, (row) + 3 * (apart)))
#elif TILE == 8
#define SHUFFLE_PARTS(a, b, i, j, k, l) \
  __builtin_shufflevector(a, b, i, j, k + 4, l + 4, i + 4, j + 4, k + 8, l + 8)
#define JOIN_ROWS JOIN_TWO
#define SPLIT_ROWS(type, vector, row, apart) (PUT_PART(type, vector, 0, row), PUT_PART(type, vector, 1, (row) + (apart)))
#else
#define SHUFFLE_PARTS(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define JOIN_ROWS(type, row, apart) (*(const type *)(row))
#define SPLIT_ROWS(type, vector, row, apart) (*(type *)(row) = (type)(vector))
#endif

/* Transpose the 4 x 4 matrix in each part; its own inverse. */
INLINE void transpose_tile(tile m[4]) {
  /* Indices 0-3 name the first vector's part, 4-7 the second's; with more lanes the macro adds what is missing. */
  tile a = SHUFFLE_PARTS(m[0], m[1], 0, 1, 4, 5), b = SHUFFLE_PARTS(m[0], m[1], 2, 3, 6, 7);
  tile c = SHUFFLE_PARTS(m[2], m[3], 0, 1, 4, 5), d = SHUFFLE_PARTS(m[2], m[3], 2, 3, 6, 7);
  m[0] = SHUFFLE_PARTS(a, c, 0, 2, 4, 6), m[1] = SHUFFLE_PARTS(a, c, 1, 3, 5, 7);
  m[2] = SHUFFLE_PARTS(b, d, 0, 2, 4, 6), m[3] = SHUFFLE_PARTS(b, d, 1, 3, 5, 7);
}

/* Rows of four numbers at `stride`, coordinates j, j + 4, ... to the parts of m[j]. */
INLINE void load_tile(tile m[4], const void *from, size_t stride, int bfloat16) {
  UNROLL for (int j = 0; j < 4; j++) {
    if (bfloat16) {
      const uint16_t *row = (const uint16_t *)from + j * stride;
      m[j] = (tile)(__builtin_convertvector(JOIN_ROWS(loose_halves, row, 4 * stride), tile_bits) << 16);
    } else {
      const float *row = (const float *)from + j * stride;
      m[j] = JOIN_ROWS(loose_floats, row, 4 * stride);
    }
  }
}

INLINE void store_tile(const tile m[4], void *to, size_t stride, int bfloat16) {
  UNROLL for (int j = 0; j < 4; j++) {
    if (bfloat16) {
      tile_bits bits = (tile_bits)m[j];
      tile_bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
      tile_bits is_nan = (tile_bits)((bits & 0x7fffffff) > 0x7f800000);
      tile_halves halves = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), tile_halves);
      uint16_t *row = (uint16_t *)to + j * stride;
      SPLIT_ROWS(loose_halves, halves, row, 4 * stride);
    } else {
      float *row = (float *)to + j * stride;
      SPLIT_ROWS(loose_floats, m[j], row, 4 * stride);
    }
  }
}

/* ---- the same for eight numbers, where two rows fill a vector -------------------------------------------------------- */

#if LANES == 16
/* Every other number of two vectors, from the first or from the second one on; and the first or second halves of two, in
 * turns. Done to all vectors, either turns the place of an element, counted through them, by one bit: three times brings
 * the three bits that say which number of a row it is to the front, or back. */
#define UNZIP(a, b, first)                                                                                    \
  __builtin_shufflevector(a, b, first, first + 2, first + 4, first + 6, first + 8, first + 10, first + 12, first + 14, \
                          first + 16, first + 18, first + 20, first + 22, first + 24, first + 26, first + 28, first + 30)
#define ZIP(a, b, half)                                                                                    \
  __builtin_shufflevector(a, b, half, half + 16, half + 1, half + 17, half + 2, half + 18, half + 3, half + 19, \
                          half + 4, half + 20, half + 5, half + 21, half + 6, half + 22, half + 7, half + 23)

INLINE void unzip_vectors(vec to[8], const vec from[8]) {
  UNROLL for (int j = 0; j < 4; j++) {
    to[j] = UNZIP(from[2 * j], from[2 * j + 1], 0);
    to[j + 4] = UNZIP(from[2 * j], from[2 * j + 1], 1);
  }
}

INLINE void zip_vectors(vec to[8], const vec from[8]) {
  UNROLL for (int j = 0; j < 4; j++) {
    to[2 * j] = ZIP(from[j], from[j + 4], 0);
    to[2 * j + 1] = ZIP(from[j], from[j + 4], 8);
  }
}

typedef float loose_eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t loose_eight_halves __attribute__((vector_size(16), aligned(2), may_alias));

/* Two rows at `stride`, a vector as one piece where they follow one another. */
#define JOIN_EIGHTS(type, row, stride)                                                                        \
  __builtin_shufflevector(*(const type *)(row), *(const type *)((row) + (stride)), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \
                          10, 11, 12, 13, 14, 15)
#define SPLIT_EIGHTS(type, vector, row, stride)                                      \
  (*(type *)(row) = __builtin_shufflevector(vector, vector, 0, 1, 2, 3, 4, 5, 6, 7), \
   *(type *)((row) + (stride)) = __builtin_shufflevector(vector, vector, 8, 9, 10, 11, 12, 13, 14, 15))

INLINE vec load_two_rows(const void *from, size_t stride, int bfloat16) {
  if (stride == 8) return bfloat16 ? widen(from) : load_vec(from);
  if (!bfloat16) return JOIN_EIGHTS(loose_eight, (const float *)from, stride);
  return (vec)(__builtin_convertvector(JOIN_EIGHTS(loose_eight_halves, (const uint16_t *)from, stride), uvec) << 16);
}

INLINE void store_two_rows(void *to, size_t stride, int bfloat16, vec x) {
  if (stride == 8) {
    bfloat16 ? narrow(to, x) : store_vec(to, x);
  } else if (bfloat16) {
    hvec halves;
    narrow((uint16_t *)&halves, x);
    SPLIT_EIGHTS(loose_eight_halves, halves, (uint16_t *)to, stride);
  } else {
    SPLIT_EIGHTS(loose_eight, x, (float *)to, stride);
  }
}

/* LANES rows at `stride` to eight vectors of coordinates, `apart` from one another, and back. */
INLINE void load_eights(float *to, size_t apart, const void *rows, size_t stride, int bfloat16) {
  const size_t bytes = 2 * stride * (bfloat16 ? 2 : 4);
  vec a[8], b[8];
  UNROLL for (int j = 0; j < 8; j++) a[j] = load_two_rows((const char *)rows + j * bytes, stride, bfloat16);
  unzip_vectors(b, a), unzip_vectors(a, b), unzip_vectors(b, a);
  UNROLL for (int j = 0; j < 8; j++) store_vec(to + j * apart, b[j]);
}

INLINE void store_eights(void *rows, size_t stride, int bfloat16, const float *from, size_t apart) {
  const size_t bytes = 2 * stride * (bfloat16 ? 2 : 4);
  vec a[8], b[8];
  UNROLL for (int j = 0; j < 8; j++) a[j] = load_vec(from + j * apart);
  zip_vectors(b, a), zip_vectors(a, b), zip_vectors(b, a);
  UNROLL for (int j = 0; j < 8; j++) store_two_rows((char *)rows + j * bytes, stride, bfloat16, b[j]);
}
#endif
