// How many tiles AMX can keep in use: nanoseconds per product for orders of loads and products, everything in
// the first-level cache, on 1, half and all of this process's processors at once. What kernels/gemm_amx.cpp
// chose its order by.
//   g++ -O2 -std=c++20 -mamx-tile -mamx-bf16 benchmarks/tiles.cpp -pthread -o tiles && ./tiles
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define LOAD(tile) "tileloadd (%0,%1,1), %%tmm" #tile "\n\t"
#define ZERO(tile) "tilezero %%tmm" #tile "\n\t"
#define DOT(sum, a, b) "tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum "\n\t"
#define FOUR DOT(0, 4, 6) DOT(1, 4, 7) DOT(2, 5, 6) DOT(3, 5, 7)

struct Order {
  const char* name;
  int products;
  void (*run)(const void* tile, long steps);
};

#define ORDER(name, products, text)                                                                 \
  {name, products, [](const void* tile, long steps) {                                               \
     for (long step = 0; step < steps; step++) asm volatile(text ::"r"(tile), "r"(64L) : "memory"); \
   }}

// Sums in tiles 0 to 3, operands in 4 to 7.
const Order kOrders[] = {
    ORDER("four products, nothing loaded", 4, FOUR),
    ORDER("two of four operands loaded", 4, LOAD(6) LOAD(7) FOUR),
    ORDER("three loaded", 4, LOAD(6) LOAD(7) LOAD(4) FOUR),
    ORDER("all four loaded", 4,
          LOAD(6) LOAD(4) DOT(0, 4, 6) LOAD(7) DOT(1, 4, 7) LOAD(5) DOT(2, 5, 6) DOT(3, 5, 7)),
    ORDER("all four, zeroed after their last use", 4,
          LOAD(6) LOAD(4) DOT(0, 4, 6) LOAD(7) DOT(1, 4, 7) ZERO(4) LOAD(5) DOT(2, 5, 6) ZERO(6) DOT(3, 5, 7)
              ZERO(5) ZERO(7)),
    ORDER("two sums, one operand of each kind", 2, LOAD(4) LOAD(6) DOT(0, 4, 6) LOAD(6) DOT(1, 4, 6)),
    ORDER("three sums, one operand of each kind", 3,
          LOAD(4) LOAD(6) DOT(0, 4, 6) LOAD(6) DOT(1, 4, 6) LOAD(6) DOT(2, 4, 6)),
};

// Median of the threads' nanoseconds per product.
double measure(const Order& order, const std::vector<int>& cpus, int threads) {
  constexpr long kSteps = 40000;
  std::barrier start(threads);
  std::vector<double> ns(threads);
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; thread++)
    team.emplace_back([&, thread] {
      cpu_set_t own;
      CPU_ZERO(&own);
      CPU_SET(cpus[thread], &own);
      pthread_setaffinity_np(pthread_self(), sizeof own, &own);
      alignas(64) uint8_t tile[1024];
      std::memset(tile, 1, sizeof tile);
      const TileConfig config;
      asm volatile("ldtilecfg %0" ::"m"(config));
      start.arrive_and_wait();
      const auto begin = Clock::now();
      order.run(tile, kSteps);
      ns[thread] =
          std::chrono::duration<double, std::nano>(Clock::now() - begin).count() / kSteps / order.products;
      asm volatile("tilerelease");
    });
  for (std::thread& member : team) member.join();
  std::sort(ns.begin(), ns.end());
  return ns[threads / 2];
}

}  // namespace

int main() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return std::fprintf(stderr, "tiles: this CPU or system gives no AMX tiles\n"), 2;
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  const int all = static_cast<int>(cpus.size());
  std::printf("%-40s threads: ns per product, least and median of 7\n", "");
  for (const Order& order : kOrders) {
    std::printf("%-40s", order.name);
    for (int threads : {1, std::max(1, all / 2), all}) {
      std::vector<double> ns;
      for (int repetition = 0; repetition < 7; repetition++) ns.push_back(measure(order, cpus, threads));
      std::sort(ns.begin(), ns.end());
      std::printf("  %d: %.1f %.1f", threads, ns[0], ns[3]);
    }
    std::printf("\n");
  }
}
