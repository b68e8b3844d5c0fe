/* How many threads are worth waking, for step.c. */
#include <stdint.h>

/* Of `threads`, for a number of coordinates to step: waking one must be worth its microseconds. */
static inline int useful_threads(int threads, int64_t count) {
  int64_t worth = 1 + count / 2048;
  return threads < 1 ? 1 : threads < worth ? threads : (int)worth;
}
