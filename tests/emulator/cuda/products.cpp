// Products of warpgroups: asked for, committed in groups, and done at the latest when they are waited for. Each thread works out the sums
// that are its own, so nobody meets but the lanes of a warp.
#include "blocks.h"

namespace emulator {
namespace {

constexpr u32 GARBAGE = 0x7fe5a5a5;  // NaN

// An element of an operand in shared memory: panels of 64 columns, rows of 128 bytes, eight rows 1,024 bytes apart, pieces exchanged by
// bits 7 to 9 of the address.
unsigned short element_at(u64 operand, int panel, int row, int column) {
  u64 at = ((operand & 0x3fff) << 4) + panel * ((operand >> 16 & 0x3fff) << 4) + row / 8 * 1024 + row % 8 * 128 + column * 2;
  at ^= (at >> 7 & 7) << 4;
  if (at + 2 > (u64)shared_bytes) fail("an operand of a product lies beyond shared memory");
  unsigned short bits;
  std::memcpy(&bits, dynamic_shared + at, 2);
  return bits;
}

// c[4 j + 2 h + e] is row 16 * warp + 8 h + lane / 4 and column 8 j + lane % 4 * 2 + e, as in kernels/wgmma.cuh.
std::vector<float> work_out(const Asked& asked) {
  const Product& p = asked.product;
  float left[2][16];
  for (int h = 0; h < 2; h++)
    for (int k = 0; k < 16; k++)
      left[h][k] = p.element(p.registers ? asked.rows[h][k] : element_at(p.a, 0, me / 32 % 4 * 16 + h * 8 + lane() / 4, k));
  std::vector<float> sums(p.count);
  for (int j = 0; j < p.count / 4; j++)
    for (int e = 0; e < 2; e++) {
      int n = 8 * j + lane() % 4 * 2 + e;
      double sum[2] = {};
      for (int k = 0; k < 16; k++) {
        double right = p.element(p.columns ? element_at(p.b, n / 64, k, n % 64) : element_at(p.b, 0, n, k));
        for (int h = 0; h < 2; h++) sum[h] += left[h][k] * right;
      }
      for (int h = 0; h < 2; h++) sums[4 * j + 2 * h + e] = (float)sum[h];
    }
  return sums;
}

Sums& sums_at(float* at) {
  for (Sums& sums : mine().sums)
    if (sums.at == at) return sums;
  mine().sums.push_back({at, {}, 0});
  return mine().sums.back();
}

void finish(Asked& asked) {
  const Product& p = asked.product;
  if (p.registers && std::memcmp(p.registers, asked.registers, sizeof asked.registers))
    fail("registers of a product have changed while it was under way");
  std::vector<float> done = asked.done.empty() ? work_out(asked) : asked.done;
  Sums& sums = sums_at(p.sums);
  for (int i = 0; i < p.count; i++) sums.values[i] = p.add ? sums.values[i] + done[i] : done[i];
  if (--sums.asked) return;
  for (int i = 0; i < p.count; i++)
    if (std::memcmp(p.sums + i, &GARBAGE, 4)) fail("sums have changed while products that add to them were under way");
  std::memcpy(p.sums, sums.values.data(), 4 * p.count);
  std::swap(sums, mine().sums.back());
  mine().sums.pop_back();
}

// What lanes bring to a product, and what each takes away: its two rows of an operand that stands in registers.
union Exchanged {
  struct {
    u64 a, b;
    u32 registers[4], add;
  } brought;
  unsigned short rows[2][16];
};

}  // namespace

u64 shared_offset(const void* at) {
  const char* byte = static_cast<const char*>(at);
  if (byte < dynamic_shared || byte >= dynamic_shared + shared_bytes) fail("an operand does not lie in dynamic shared memory");
  return byte - dynamic_shared;
}

void products_begin() { mine().may_multiply = true; }
void products_commit() { mine().product_groups++; }

void multiply(const Product& product) {
  if (!mine().may_multiply) fail("multiplies without products_begin");
  Asked asked{product, mine().product_groups, {}, {}, {}};
  Exchanged exchanged{};
  exchanged.brought.a = product.a, exchanged.brought.b = product.b, exchanged.brought.add = product.add;
  if (product.registers) std::memcpy(asked.registers, product.registers, 16), std::memcpy(exchanged.brought.registers, product.registers, 16);
  exchanged = meet("a product", exchanged, [](Exchanged* lanes) {
    Exchanged before[32];
    std::memcpy(before, lanes, sizeof before);
    for (int lane = 0; lane < 32; lane++) {
      if (before[lane].brought.a != before[0].brought.a || before[lane].brought.b != before[0].brought.b || before[lane].brought.add != before[0].brought.add)
        fail("lanes ask for different products");
      for (int t = 0; t < 4; t++)
        for (int r = 0; r < 4; r++)  // rows g and g + 8, then eight columns on
          std::memcpy(&lanes[lane].rows[r % 2][2 * t + r / 2 * 8], &before[lane / 4 * 4 + t].brought.registers[r], 4);
    }
  });
  std::memcpy(asked.rows, exchanged.rows, sizeof asked.rows);
  Sums& sums = sums_at(product.sums);
  if (!sums.asked++) {
    sums.values.assign(product.sums, product.sums + product.count);
    for (int i = 0; i < product.count; i++) std::memcpy(product.sums + i, &GARBAGE, 4);
  }
  if (roll(2)) asked.done = work_out(asked);  // operands are read at once, or as late as may be
  mine().products.push_back(asked);
}

void products_wait(int pending) {
  std::vector<Asked>& products = mine().products;
  size_t done = 0;
  for (; done < products.size() && products[done].group < mine().product_groups - pending; done++) finish(products[done]);
  products.erase(products.begin(), products.begin() + done);
  mine().may_multiply = false;
  meet("products_wait", 0, [](int*) {});
}

}  // namespace emulator
