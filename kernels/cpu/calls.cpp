// calls: what a step of a stage has called, again, without anything between.
#include "calls.h"

struct Recorded { int (*function)(const Argument*); const Argument* arguments; };

// -1, or, where one fails, which that was and the status that it gave, below 256: the others are not called.
extern "C" long run_calls(const Recorded* calls, long count) {
  for (long i = 0; i < count; i++)
    if (int status = calls[i].function(calls[i].arguments)) return i << 8 | status;
  return -1;
}
