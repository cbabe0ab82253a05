// Tasks on threads. Implemented in threads.cpp, once: the kernels of each instruction set share it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fused_attention {

using Task = void (*)(const void* plan, int64_t task, char* scratch);

// Runs task 0 .. tasks - 1, in that order of starting, each with scratch of its thread (64-byte aligned). Serial
// where threads <= 1, inside an OpenMP region, in a forked child of a process that binds OpenMP's threads to cores, or
// where `work` (multiply-adds) is too little to pay for waking a thread. False if the scratch could not be allocated;
// then nothing ran.
bool run_tasks(int64_t tasks, int threads, double work, size_t scratch_bytes, Task run, const void* plan);

// A forked child has none of its parent's threads and starts its own. Call once, when the library is loaded.
void watch_forks();

// 64-byte aligned memory; null if there is none.
void* allocate(size_t bytes);
void release(void* memory);

// Tells the system that all of this memory is about to be written. An allocator gets large blocks fresh from it, and
// page by page that took four times as long as writing the weights did.
void prefer_large_pages(void* memory, size_t bytes);

}  // namespace fused_attention
