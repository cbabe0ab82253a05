// The products of this instruction set (-DFA_PRODUCTS: 1 tiles of AMX, 2 the same in plain C++, 3 dot products of AVX-512),
// and a queue of them.
#pragma once
#if FA_PRODUCTS == 3
  #include "dots.h"
#else
  #include "amx.h"
#endif

FA_BEGIN

// Products that wait to be run between pieces of vector work, so that both units are busy: `count` of them, each so many
// elements further on.
struct Batch {
  Product first;
  int count;
  int64_t a, b, c;
};
class Queue {
 public:
  void push(const Batch& batch) {
    if (batch.count <= 0 || batch.first.steps <= 0) return;
    if (end_ == kMost) run_all();
    batches_[end_++] = batch;
    left_ += batch.count;
  }
  // The share of what is left that falls to one of `pieces` pieces of vector work.
  void run_share(int pieces) {
    for (int n = (left_ + pieces - 1) / pieces; n > 0; --n) run_one();
  }
  void run_all() {
    while (left_) run_one();
  }

 private:
  static constexpr int kMost = 16;
  Batch batches_[kMost];
  int begin_ = 0, end_ = 0, left_ = 0;

  void run_one() {
    Batch& b = batches_[begin_];
    if (b.first.int8)
      multiply<true>(b.first);
    else
      multiply<false>(b.first);
    b.first.a.at += b.a, b.first.b.at += b.b, b.first.c += b.c;
    if (--b.count == 0) ++begin_;
    if (--left_ == 0) begin_ = end_ = 0;
  }
};

FA_END
