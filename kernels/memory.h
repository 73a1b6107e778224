// Large, zeroed, huge-page friendly memory straight from the kernel, given back on destruction.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

// Asks for huge pages and for the NUMA node of memory that someone else mapped, for the whole pages in it.
// Best effort.
void advise_borrowed(const void* data, size_t bytes, int node);

class Memory {
 public:
  Memory() = default;
  // node >= 0 asks for pages of that NUMA node; the request is best effort.
  explicit Memory(size_t bytes, int node = -1);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  // Huge pages, which several threads can populate at the same time, before they are written. What is in them
  // stays. Best effort: otherwise they come with the first write.
  int64_t huge_pages() const;
  void populate(int64_t huge_page) const;

  // What a request of this size takes: whole pages, huge ones from the size of one on.
  static size_t mapped_bytes(size_t bytes);

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace kt
