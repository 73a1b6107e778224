// mmap, madvise and mbind; nothing about what is stored.
#include "memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <utility>

namespace kt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kMpolPreferred = 1;

void prefer_node(void* data, size_t bytes, int node) {
  const unsigned long mask = 1ul << node;
  syscall(SYS_mbind, data, bytes, kMpolPreferred, &mask, sizeof(mask) * 8, 0);
}

// Linux 5.14. Headers may be older.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

}  // namespace

void advise_borrowed(const void* data, size_t bytes, int node) {
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (end < begin + kHugePage) return;
  auto* first = reinterpret_cast<void*>(begin);
  madvise(first, end - begin, MADV_HUGEPAGE);
  if (node >= 0 && node < 64) prefer_node(first, end - begin, node);
}

size_t Memory::mapped_bytes(size_t bytes) {
  const size_t page = bytes >= kHugePage ? kHugePage : kPage;
  return (bytes + page - 1) / page * page;
}

#if defined(__SANITIZE_ADDRESS__)

// From the heap, to the byte: AddressSanitizer sees what is read behind the end.
Memory::Memory(size_t bytes, int) : bytes_(bytes) {
  if (bytes == 0) return;
  data_ = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{kPage}));
  std::fill_n(data_, bytes, uint8_t{0});
}

Memory::~Memory() { ::operator delete(data_, std::align_val_t{kPage}); }

#else

Memory::Memory(size_t bytes, int node) {
  if (bytes == 0) return;
  const bool large = bytes >= kHugePage;
  bytes_ = mapped_bytes(bytes);
  // A mapping larger by one huge page can be cut to a huge-page boundary, without which the first and last 2
  // MiB stay small.
  const size_t mapped = large ? bytes_ + kHugePage : bytes_;
  void* base =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(base);
  if (!large) return;
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(base) % kHugePage) % kHugePage;
  if (head > 0) munmap(data_, head);
  data_ += head;
  if (head < kHugePage) munmap(data_ + bytes_, kHugePage - head);
  madvise(data_, bytes_, MADV_HUGEPAGE);
  if (node >= 0 && node < 64) prefer_node(data_, bytes_, node);
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

#endif

int64_t Memory::huge_pages() const { return static_cast<int64_t>((bytes_ + kHugePage - 1) / kHugePage); }

void Memory::populate(int64_t huge_page) const {
  const size_t begin = static_cast<size_t>(huge_page) * kHugePage;
  madvise(data_ + begin, std::min(kHugePage, bytes_ - begin), MADV_POPULATE_WRITE);
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace kt
