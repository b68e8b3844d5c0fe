/* Compile KERNEL, the name of a header, once for each instruction set, and define DISPATCH, which calls the best that the
 * processor has. The header sees LANES, SUFFIX and perhaps ISA_AVX2 or ISA_AVX512, and undefines what it defines. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

#define LANES 4
#define SUFFIX _plain
#include KERNEL

#if defined(__x86_64__) && defined(__GNUC__)
#define X86_VARIANTS

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define LANES 8
#define SUFFIX _avx2
#define ISA_AVX2
#include KERNEL
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")
#endif
#define LANES 16
#define SUFFIX _avx512
#define ISA_AVX512
#include KERNEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* Instruction sets by number: 0 plain, 1 AVX2, 2 AVX-512. */
int learned_optim_isa(void);

#ifdef X86_VARIANTS
#define DISPATCH(function, ...)                               \
  (learned_optim_isa() == 2   ? function##_avx512(__VA_ARGS__) \
   : learned_optim_isa() == 1 ? function##_avx2(__VA_ARGS__)   \
                              : function##_plain(__VA_ARGS__))
#else
#define DISPATCH(function, ...) function##_plain(__VA_ARGS__)
#endif
