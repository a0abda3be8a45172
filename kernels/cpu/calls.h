// Calls of this folder's functions by arguments that lie in memory, so that many are made by one call (calls.cpp).
#pragma once
#include <cstddef>
#include <utility>

union Argument { int i; long l; float f; const void* p; };

template <class A> struct As;
template <> struct As<int> { static int of(const Argument& a) { return a.i; } };
template <> struct As<long> { static long of(const Argument& a) { return a.l; } };
template <> struct As<float> { static float of(const Argument& a) { return a.f; } };
template <class A> struct As<A*> { static A* of(const Argument& a) { return (A*)a.p; } };

template <class... A, std::size_t... I>
static inline void call(void (*function)(A...), const Argument* arguments, std::index_sequence<I...>) {
  function(As<A>::of(arguments[I])...);
}
template <class... A> static inline void call(void (*function)(A...), const Argument* arguments) {
  call(function, arguments, std::index_sequence_for<A...>());
}

#define CALLABLE(function) \
  extern "C" int function##_call(const Argument* arguments) { call(function, arguments); return 0; }
