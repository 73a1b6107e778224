// A thread that runs HostCalls when a word in memory asks for them: a device that writes this word and reads
// the answer waits for no driver. Knows nothing of CUDA; host_call.h says what a call does, and nothing is
// thrown.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "host_call.h"

namespace kt {

class Mailbox {
 public:
  // Words of int32, far from each other. The device writes a call's number into kRequest and waits until the
  // same number is in kAnswer, which it then sets back to 0, or kClosed beside it is not 0: then no answer
  // will ever come, and where the thread had to end, the records of all calls say why.
  static constexpr size_t kRequest = 0;
  static constexpr size_t kAnswer = 32;
  static constexpr size_t kClosed = kAnswer + 1;
  static constexpr size_t kWords = 64;

  // `words` must outlive it. Starts the thread; std::runtime_error where there is none to be had.
  explicit Mailbox(int32_t* words);
  // Waits for the call that runs, and closes.
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  // The call's number, 1 and up; the call must outlive this mailbox.
  int32_t add(HostCall& call);
  // Requests are about to come: a thread that had nothing to do for long looks again at once.
  void announce();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt
