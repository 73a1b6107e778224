// What this machine can do at most: bytes per second read from memory, and operations per second of each
// instruction set's multiply-add, by pinned threads that run together. Prints one JSON object per thread
// count. Built and run by peaks.py; needs g++ 11 or newer.
//   peaks [--threads 1,2] [--mb 1024] [--ms 40] [--reps 5] [--serve 0]
//   2 operations per multiply-add; 1 GB = 1e9 bytes; best of the repetitions
// --serve 1 answers each line on stdin with the read rate of the next --ms, for comparisons that take turns.
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#define WITH(isa) __attribute__((target(isa), noinline))

namespace {

using Clock = std::chrono::steady_clock;
// Does `units` units of work on thread `thread`.
using Work = std::function<void(int thread, long units)>;

struct Cpu {
  bool avx2 = false, avx512 = false, bf16 = false, vnni = false, amx_bf16 = false, amx_int8 = false;
};

Cpu probe() {
  Cpu cpu;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __builtin_cpu_init();
  cpu.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  cpu.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  cpu.vnni = cpu.avx512 && __builtin_cpu_supports("avx512vnni");
  __cpuid_count(7, 0, eax, ebx, ecx, edx);
  const bool tile = (edx >> 24 & 1) != 0, tile_int8 = (edx >> 25 & 1) != 0, tile_bf16 = (edx >> 22 & 1) != 0;
  __cpuid_count(7, 1, eax, ebx, ecx, edx);
  cpu.bf16 = cpu.avx512 && (eax >> 5 & 1) != 0;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) {
    cpu.amx_bf16 = tile_bf16;
    cpu.amx_int8 = tile_int8;
  }
  return cpu;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  cpu_set_t set;
  sched_getaffinity(0, sizeof set, &set);
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// Seconds from the first thread's start to the last one's end.
double together(const std::vector<int>& cpus, int threads, long units, const Work& work) {
  std::barrier start(threads);
  std::vector<Clock::time_point> begin(threads), end(threads);
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; thread++)
    team.emplace_back([&, thread] {
      pin(cpus[thread % cpus.size()]);
      start.arrive_and_wait();
      begin[thread] = Clock::now();
      work(thread, units);
      end[thread] = Clock::now();
    });
  for (std::thread& member : team) member.join();
  const auto first = *std::min_element(begin.begin(), begin.end());
  return std::chrono::duration<double>(*std::max_element(end.begin(), end.end()) - first).count();
}

struct Bench {
  std::vector<int> cpus;
  int threads = 1, reps = 5;
  double seconds = 0.04;

  // 1e9 amounts per second of all threads together, where a unit is `amount` on each.
  double best(double amount, const Work& work) const {
    long units = 1;
    double spent = together(cpus, threads, units, work);
    while (spent < seconds / 4) spent = together(cpus, threads, units *= 4, work);
    units = std::max(1L, static_cast<long>(units * seconds / spent));
    for (int rep = 0; rep < reps; rep++) {
      const double now = together(cpus, threads, units, work) / units;
      spent = rep == 0 ? now : std::min(spent, now);
    }
    return amount * threads / spent / 1e9;
  }
};

// ---- memory ----

volatile uint64_t sink;

template <int kAhead>  // bytes of software prefetch, 0 for none
WITH("avx512f") void read_512(const char* data, size_t bytes) {
  __m512i sum[8] = {};
  for (size_t at = 0; at < bytes; at += 512)
    for (int i = 0; i < 8; i++) {
      if (kAhead > 0) _mm_prefetch(data + at + 64 * i + kAhead, _MM_HINT_T0);
      sum[i] = _mm512_or_si512(sum[i], _mm512_load_si512(data + at + 64 * i));
    }
  for (int i = 1; i < 8; i++) sum[0] = _mm512_or_si512(sum[0], sum[i]);
  alignas(64) uint64_t words[8];
  _mm512_store_si512(words, sum[0]);
  sink = words[0];
}

WITH("avx2") void read_256(const char* data, size_t bytes) {
  __m256i sum[8] = {};
  for (size_t at = 0; at < bytes; at += 256)
    for (int i = 0; i < 8; i++)
      sum[i] = _mm256_or_si256(sum[i], _mm256_load_si256((const __m256i*)(data + at + 32 * i)));
  for (int i = 1; i < 8; i++) sum[0] = _mm256_or_si256(sum[0], sum[i]);
  sink = _mm256_extract_epi64(sum[0], 0);
}

void read_64(const char* data, size_t bytes) {
  uint64_t sum = 0;
  for (size_t at = 0; at < bytes; at += 8) sum |= *reinterpret_cast<const uint64_t*>(data + at);
  sink = sum;
}

// Every thread reads its own part over and over, a sixteenth a unit, and goes on where it was: a short
// reading finds nothing that the last one left in the caches.
class Region {
 public:
  Region(const Bench& bench, size_t bytes)
      : part_(bytes / bench.threads / 16 & ~size_t{4095}), positions_(bench.threads) {
    bytes_ = part_ * 16 * bench.threads + 4096;
    data_ =
        static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (data_ == MAP_FAILED) std::perror("peaks: mmap"), std::exit(1);
    madvise(data_, bytes_, MADV_HUGEPAGE);
    together(bench.cpus, bench.threads, 1, [this](int thread, long) { fill(thread); });
  }
  ~Region() { munmap(data_, bytes_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  double gbs(const Bench& bench, void (*read)(const char*, size_t)) {
    return bench.best(static_cast<double>(part_), [=, this](int thread, long units) {
      long& position = positions_[thread].unit;
      for (long unit = 0; unit < units; unit++) read(data_ + part_ * (16 * thread + position++ % 16), part_);
    });
  }

 private:
  // By the thread that reads it, so that its pages lie on that thread's NUMA node.
  void fill(int thread) {
    auto* words = reinterpret_cast<uint64_t*>(data_ + part_ * 16 * thread);
    for (size_t i = 0; i < part_ * 2; i++) words[i] = i * 0x9e3779b97f4a7c15u;
  }
  struct alignas(64) Position {
    long unit = 0;
  };
  size_t part_, bytes_;
  std::vector<Position> positions_;
  char* data_;
};

void serve_read_gbs(Bench bench, const Cpu& cpu, size_t bytes) {
  Region region(bench, bytes);
  void (*read)(const char*, size_t) = cpu.avx512 ? read_512<0> : cpu.avx2 ? read_256 : read_64;
  if (cpu.avx512 && region.gbs(bench, read_512<4096>) > region.gbs(bench, read)) read = read_512<4096>;
  bench.reps = 1;
  while (std::getchar() != EOF) {
    std::printf("%.6g\n", region.gbs(bench, read));
    std::fflush(stdout);
  }
}

double read_gbs(const Bench& bench, const Cpu& cpu, size_t bytes) {
  Region region(bench, bytes);
  if (cpu.avx512) return std::max(region.gbs(bench, read_512<0>), region.gbs(bench, read_512<4096>));
  return region.gbs(bench, cpu.avx2 ? read_256 : read_64);
}

// ---- arithmetic: independent accumulators in registers, ones as operands so that no unit sees only zeros
// ----

#define ACCUMULATORS "0,1,2,3,4,5,6,7,8,9,10,11,12,13"
#define CLOBBERED                                                                                            \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
      "xmm13", "xmm14", "xmm15"
constexpr int kAccumulators = 14;

// 16 rounds over the accumulators a unit, so that the loop itself costs nothing.
#define REGISTER_LOOP(name, isa, reg, instruction, ones)                                                   \
  WITH(isa) void name(int, long units) {                                                                   \
    const uint32_t one = ones;                                                                             \
    asm volatile("vmovd %0,%%xmm14\n\tvpbroadcastd %%xmm14,%%" reg "14\n\tvpbroadcastd %%xmm14,%%" reg     \
                 "15"                                                                                      \
                 "\n\t.irp r," ACCUMULATORS "\n\tvpxor %%xmm\\r,%%xmm\\r,%%xmm\\r\n\t.endr" ::"r"(one)     \
                 : CLOBBERED);                                                                             \
    for (long unit = 0; unit < units; unit++)                                                              \
      asm volatile(".rept 16\n\t.irp r," ACCUMULATORS "\n\t" instruction " %%" reg "14,%%" reg "15,%%" reg \
                   "\\r\n\t.endr\n\t.endr" ::                                                              \
                       : CLOBBERED);                                                                       \
    _mm256_zeroupper();                                                                                    \
  }

REGISTER_LOOP(f32_avx2, "avx2,fma", "ymm", "vfmadd231ps", 0x3f800000)
REGISTER_LOOP(f32_avx512, "avx512f", "zmm", "vfmadd231ps", 0x3f800000)
REGISTER_LOOP(bf16_avx512, "avx512f,avx512bf16", "zmm", "vdpbf16ps", 0x3f803f80)
REGISTER_LOOP(int8_avx512, "avx512f,avx512vnni", "zmm", "vpdpbusd", 0x01010101)

// AVX2 without VNNI has no such instruction: multiply u8·s8 to pairs, pairs to fours, add.
WITH("avx2") void int8_avx2(int, long units) {
  const uint32_t one = 0x01010101;
  asm volatile("vmovd %0,%%xmm14\n\tvpbroadcastd %%xmm14,%%ymm14\n\tvmovdqa %%ymm14,%%ymm15" ::"r"(one)
               : CLOBBERED);
  for (long unit = 0; unit < units * 16; unit++)
    asm volatile(
        ".irp r,0,1,2,3,4,5,6\n\tvpmaddubsw %%ymm14,%%ymm15,%%ymm13\n\tvpmaddwd %%ymm15,%%ymm13,%%ymm13\n\t"
        "vpaddd %%ymm13,%%ymm\\r,%%ymm\\r\n\t.endr" ::
            : CLOBBERED);
  _mm256_zeroupper();
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 or 0 to 4 accumulate, 6 and 7 are operands: four hide the latency of a product, and where two
// threads share a core a sixth is one more than its tile registers can hold (benchmarks/tiles.cpp).
#define TILE_LOOP(name, isa, instruction, sums, ones)                                        \
  WITH(isa) void name(int, long units) {                                                     \
    alignas(64) uint32_t operand[256];                                                       \
    std::fill(operand, operand + 256, ones);                                                 \
    const TileConfig config;                                                                 \
    _tile_loadconfig(&config);                                                               \
    asm volatile(".irp t," sums "\n\ttilezero %%tmm\\t\n\t.endr" ::);                        \
    _tile_loadd(6, operand, 64);                                                             \
    _tile_loadd(7, operand, 64);                                                             \
    for (long unit = 0; unit < units; unit++)                                                \
      asm volatile(".irp t," sums "\n\t" instruction " %%tmm7,%%tmm6,%%tmm\\t\n\t.endr" ::); \
    _tile_release();                                                                         \
  }
TILE_LOOP(bf16_amx4, "amx-tile,amx-bf16", "tdpbf16ps", "0,1,2,3", 0x3f803f80u)
TILE_LOOP(bf16_amx5, "amx-tile,amx-bf16", "tdpbf16ps", "0,1,2,3,4", 0x3f803f80u)
TILE_LOOP(int8_amx4, "amx-tile,amx-int8", "tdpbssd", "0,1,2,3", 0x01010101u)
TILE_LOOP(int8_amx5, "amx-tile,amx-int8", "tdpbssd", "0,1,2,3,4", 0x01010101u)

void print_peaks(const Bench& bench, const Cpu& cpu, size_t bytes) {
  std::printf("{\"threads\": %d, \"read_gbs\": %.6g", bench.threads, read_gbs(bench, cpu, bytes));
  const auto print = [&](const char* name, bool usable, double amount, const Work& work) {
    if (usable) std::printf(", \"%s\": %.6g", name, bench.best(amount, work));
  };
  const auto print_tiles = [&](const char* name, bool usable, double product, const Work& four,
                               const Work& five) {
    if (!usable) return;
    std::printf(", \"%s\": %.6g", name,
                std::max(bench.best(4 * product, four), bench.best(5 * product, five)));
  };
  constexpr double kRound = 16.0 * kAccumulators;
  print("avx2_f32_gflops", cpu.avx2, kRound * 16, f32_avx2);
  print("avx2_int8_gops", cpu.avx2, 16.0 * 7 * 64, int8_avx2);
  print("avx512_f32_gflops", cpu.avx512, kRound * 32, f32_avx512);
  print("avx512_bf16_gflops", cpu.bf16, kRound * 64, bf16_avx512);
  print("avx512_int8_gops", cpu.vnni, kRound * 128, int8_avx512);
  print_tiles("amx_bf16_gflops", cpu.amx_bf16, 16384, bf16_amx4, bf16_amx5);
  print_tiles("amx_int8_gops", cpu.amx_int8, 32768, int8_amx4, int8_amx5);
  std::printf("}\n");
  std::fflush(stdout);
}

std::vector<int> numbers(const char* text) {
  std::vector<int> found;
  for (char* rest = const_cast<char*>(text); *rest != 0; rest += *rest == ',') {
    char* const before = rest;
    found.push_back(static_cast<int>(std::strtol(rest, &rest, 10)));
    if (rest == before || found.back() < 1)
      std::fprintf(stderr, "peaks: --threads %s: expected numbers from 1\n", text), std::exit(2);
  }
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  Bench bench;
  bench.cpus = allowed_cpus();
  std::vector<int> threads = {static_cast<int>(bench.cpus.size())};
  size_t bytes = size_t{1} << 30;
  bool serve = false;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (name == "--threads")
      threads = numbers(value);
    else if (name == "--mb")
      bytes = static_cast<size_t>(std::atol(value)) << 20;
    else if (name == "--ms")
      bench.seconds = std::atof(value) / 1e3;
    else if (name == "--reps")
      bench.reps = std::atoi(value);
    else if (name == "--serve")
      serve = std::atoi(value) != 0;
    else
      return std::fprintf(stderr, "peaks: unknown option %s; see the first lines of peaks.cpp\n", argv[i]), 2;
  }
  const Cpu cpu = probe();
  for (const int count : threads) {
    bench.threads = count;
    if (serve) return serve_read_gbs(bench, cpu, bytes), 0;
    print_peaks(bench, cpu, bytes);
  }
}
