// The process's own threads, shared by all kernels.
//
// XLA's pool is not used: a caller that waits there deadlocks when as many devices call at once as it has threads.
#pragma once

#include <cstddef>

namespace jaxopt {

// Threads that work on a job, the caller included.
int num_threads();
// Valid at any time; `count` at least 1.
void set_num_threads(int count);

// Calls `run(context, chunk)` for every chunk below `count`, once, in any order, on several threads; returns when all
// are done. The caller works too and needs no other thread to finish.
void parallel(size_t count, void (*run)(const void* context, size_t chunk), const void* context);

template <class Function>
void parallel_for(size_t count, const Function& function) {
  parallel(
      count, [](const void* context, size_t chunk) { (*static_cast<const Function*>(context))(chunk); }, &function);
}

}  // namespace jaxopt
