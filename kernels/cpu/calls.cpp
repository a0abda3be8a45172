// calls: what a step of a stage has called, again, without anything between.
#include "calls.h"

struct Recorded { void (*function)(const Argument*); const Argument* arguments; };

extern "C" void run_calls(const Recorded* calls, long count) {
  for (long i = 0; i < count; i++) calls[i].function(calls[i].arguments);
}
