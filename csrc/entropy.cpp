#include "entropy.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace nncx {
namespace {

constexpr int kWindow = kHuffmanMaxLength;  // bits that a look-up sees
constexpr int kWindows = 1 << kWindow;

// ------------------------------------------------------------------------------------------------
// lengths

// The symbols of a code, rarest first; equally frequent ones in their order. There are two at
// least: where the text has fewer, the first symbols that it lacks.
int sorted_symbols(const int64_t* counts, int symbols, uint8_t* sorted) {
  int n = 0, used = 0;
  for (int s = 0; s < symbols; ++s) used += counts[s] > 0;
  int companions = std::max(0, 2 - used);
  for (int s = 0; s < symbols; ++s) {
    if (counts[s] > 0 || companions-- > 0) sorted[n++] = static_cast<uint8_t>(s);
  }
  std::sort(sorted, sorted + n, [&](uint8_t a, uint8_t b) {
    return counts[a] != counts[b] ? counts[a] < counts[b] : a < b;
  });
  return n;
}

// ------------------------------------------------------------------------------------------------
// codes

struct Code {
  uint16_t bits;  // the first one lowest
  uint8_t length;
};

uint16_t reversed(uint32_t code, int length) {
  uint32_t bits = 0;
  for (int i = 0; i < length; ++i) bits |= (code >> i & 1) << (length - 1 - i);
  return static_cast<uint16_t>(bits);
}

void canonical_codes(const HuffmanCode& code, Code* codes) {
  uint32_t next = 0;
  for (int length = 1; length <= kHuffmanMaxLength; ++length) {
    next <<= 1;
    for (int s = 0; s < code.symbols; ++s) {
      if (code.lengths[s] != length) continue;
      codes[s] = {reversed(next++, length), static_cast<uint8_t>(length)};
    }
  }
}

// ------------------------------------------------------------------------------------------------
// decoding

constexpr int kLookups = 3;     // between two loads: 36 bits of the 57 that a load always has ...
constexpr int kMaxOutput = 16;  // ... and 48 bits of output, beside the 7 that wait for their byte
constexpr int kStride = kLookups * kMaxOutput;

// What a window of the stream begins with.
struct Tables {
  uint8_t symbol[kWindows];
  uint8_t length[kWindows];  // of the code of `symbol`
  uint32_t run[kWindows];    // of all whole codes that it holds: symbols << 16 | their bits << 4 |
                             // the bits of their codes
};

void fill_tables(const HuffmanCode& code, int width, Tables& t) {
  Code codes[kHuffmanMaxSymbols] = {};
  canonical_codes(code, codes);
  for (int s = 0; s < code.symbols; ++s) {
    if (!codes[s].length) continue;
    for (int window = codes[s].bits; window < kWindows; window += 1 << codes[s].length) {
      t.symbol[window] = static_cast<uint8_t>(s);
      t.length[window] = codes[s].length;
    }
  }
  for (int window = 0; window < kWindows; ++window) {
    uint32_t output = 0;
    int output_bits = 0, used = 0;
    for (int rest = window; output_bits + width <= kMaxOutput; rest = window >> used) {
      if (used + t.length[rest] > kWindow) break;
      output |= static_cast<uint32_t>(t.symbol[rest]) << output_bits;
      output_bits += width;
      used += t.length[rest];
    }
    t.run[window] = output << 16 | output_bits << 4 | used;
  }
}

static_assert(std::endian::native == std::endian::little, "load and store of a stream");

uint64_t load(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

void store(uint8_t* bytes, uint64_t word) { std::memcpy(bytes, &word, sizeof word); }

// The window at a bit of the stream, behind whose end there are zeros.
uint32_t window_at(const HuffmanStream& stream, int64_t bit) {
  uint32_t bits = 0;
  for (int i = 0; i < 3; ++i) {  // 7 + 12 bits
    const int64_t byte = bit / 8 + i;
    if (byte < stream.size) bits |= static_cast<uint32_t>(stream.bytes[byte]) << 8 * i;
  }
  return bits >> bit % 8 & (kWindows - 1);
}

// Writes codes of at most 8 bits into zeros, at bits that only grow. It stores eight bytes and never
// reads any: a load of two bytes, of which the store before has one, waits until that is through.
class Pen {
 public:
  // The output begins with `word` at the byte `at`.
  Pen(uint8_t* packed, int64_t size, int64_t at = 0, uint64_t word = 0)
      : packed_(packed), size_(size), at_(at), word_(word) {}

  void put(int64_t bit, uint64_t code) {
    const int64_t byte = bit >> 3, passed = byte - at_;
    const uint64_t before = passed < 8 ? word_ >> 8 * passed : 0;
    const uint64_t word = before | code << (bit & 7);
    word_ = word;
    at_ = byte;
    if (byte + 8 <= size_) {
      store(packed_ + byte, word);
    } else {
      std::memcpy(packed_ + byte, &word, size_ - byte);
    }
  }

 private:
  uint8_t* packed_;
  int64_t size_;
  int64_t at_;     // the byte that `word_` begins with
  uint64_t word_;  // of the output
};

}  // namespace

// Package-merge (Larmore and Hirschberg 1990). In row l are, by weight, the symbols and the pairs
// of row l - 1. The first 2n - 2 entries of the last row are the code: a symbol gets one bit for
// every time that it is in them, itself or within a pair. Only how many of the first entries of a
// row are symbols is needed for that.
void huffman_lengths(const int64_t* counts, int symbols, uint8_t* lengths) {
  uint8_t sorted[kHuffmanMaxSymbols];
  const int n = sorted_symbols(counts, symbols, sorted);
  bool is_symbol[kHuffmanMaxLength][2 * kHuffmanMaxSymbols];
  int64_t rows[2][2 * kHuffmanMaxSymbols];
  int size = 0;
  for (int l = 0; l < kHuffmanMaxLength; ++l) {
    const int64_t* before = rows[l % 2];
    int64_t* row = rows[1 - l % 2];
    const int pairs = size / 2;
    for (int i = 0, j = 0; i < n || j < pairs;) {
      const int64_t pair = j < pairs ? before[2 * j] + before[2 * j + 1] : 0;
      const bool takes_symbol = i < n && (j == pairs || counts[sorted[i]] <= pair);
      is_symbol[l][i + j] = takes_symbol;
      row[i + j] = takes_symbol ? counts[sorted[i]] : pair;
      ++(takes_symbol ? i : j);
    }
    size = n + pairs;
  }

  std::fill_n(lengths, symbols, uint8_t{0});
  int taken = 2 * n - 2;
  for (int l = kHuffmanMaxLength - 1; l >= 0; --l) {
    const int from_symbols = static_cast<int>(std::count(is_symbol[l], is_symbol[l] + taken, true));
    for (int i = 0; i < from_symbols; ++i) ++lengths[sorted[i]];
    taken = 2 * (taken - from_symbols);
  }
}

const char* huffman_check(const HuffmanCode& code) {
  int windows = 0;
  for (int s = 0; s < code.symbols; ++s) {
    if (code.lengths[s] > kHuffmanMaxLength) return "a code of it is longer than 12 bits";
    if (code.lengths[s]) windows += kWindows >> code.lengths[s];
  }
  if (windows > kWindows) return "its code lengths leave too little room";
  return windows < kWindows ? "its code lengths leave bits without a meaning" : nullptr;
}

int64_t huffman_bits(const HuffmanCode& code, const uint8_t* symbols, int64_t count) {
  int64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (symbols[i] >= code.symbols || !code.lengths[symbols[i]]) return -1;
    bits += code.lengths[symbols[i]];
  }
  return bits;
}

void huffman_encode(const HuffmanCode& code, const uint8_t* symbols, int64_t count,
                    uint8_t* stream) {
  Code codes[kHuffmanMaxSymbols] = {};
  canonical_codes(code, codes);
  uint32_t waiting = 0;
  int bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    waiting |= static_cast<uint32_t>(codes[symbols[i]].bits) << bits;
    bits += codes[symbols[i]].length;
    for (; bits >= 8; bits -= 8, waiting >>= 8) *stream++ = static_cast<uint8_t>(waiting);
  }
  if (bits) *stream = static_cast<uint8_t>(waiting);
}

const char* huffman_decode(const HuffmanStream& stream, uint8_t* packed) {
  Tables tables;
  fill_tables(stream.code, stream.width, tables);
  const int64_t bits = stream.count * stream.width, size = (bits + 7) / 8;
  int64_t to = 0;  // bits of the output

  // `held` bits of the stream are in the window, or more; the next load begins behind them, where a
  // byte may be there already: the same one. Its address never waits for the look-ups before it.
  uint64_t window = 0, waiting = 0;  // of the output, the bits of the byte that is not full yet
  int64_t next = 0, held = 0;
  while (next + 8 <= stream.size && to / 8 + 8 <= size && to + kStride <= bits) {
    window |= load(stream.bytes + next) << held;
    next += (63 - held) / 8;
    held |= 56;
    int filled = to % 8;
    for (int i = 0; i < kLookups; ++i) {
      const uint32_t run = tables.run[window & (kWindows - 1)];
      waiting |= static_cast<uint64_t>(run >> 16) << filled;
      filled += run >> 4 & 31;
      window >>= run & 15;
      held -= run & 15;
    }
    store(packed + to / 8, waiting);
    waiting >>= filled & ~7;
    to += filled - to % 8;
  }

  int64_t from = 8 * next - held;  // bits of the stream
  std::memset(packed + to / 8, 0, size - to / 8);
  if (to % 8) packed[to / 8] = static_cast<uint8_t>(waiting);
  Pen pen(packed, size, to / 8, waiting);
  for (; to < bits; to += stream.width) {
    const uint32_t window = window_at(stream, from);
    pen.put(to, tables.symbol[window]);
    from += tables.length[window];
    if (from > 8 * stream.size) return "its stream ends early";
  }
  const bool ends = (from + 7) / 8 == stream.size;
  if (!ends || (from % 8 && window_at(stream, from))) return "its stream goes on behind its end";
  return nullptr;
}

const char* relative_decode(const RelativeIndex& index, uint8_t* packed) {
  const auto [gaps, gap_count, codes, code_count, gap_bits, width, size] = index;
  const int64_t places = (8 * size + width - 1) / width;
  const int full = (1 << gap_bits) - 1;
  std::memset(packed, 0, size);
  Pen pen(packed, size);
  int64_t place = 0, taken = 0, i = 0;
  // Whether a gap ends at a code nobody can guess, so no branch asks: one that does not writes a 0.
  for (; i < gap_count && taken < code_count; ++i) {
    const bool ends = gaps[i] < full;
    const uint32_t code = codes[taken] & -static_cast<uint32_t>(ends);
    place += gaps[i];
    if (place >= places) return "its gaps lead behind its end";
    if (code >> width) return "a code of it is too large";
    const int64_t bit = place * width;
    if (place == places - 1 && bit + std::bit_width(code) > 8 * size) {
      return "its last code does not fit";
    }
    pen.put(bit, code);
    place += ends;
    taken += ends;
  }
  for (; i < gap_count; place += gaps[i++]) {
    if (gaps[i] < full) return "it has less nonzero codes than gaps";
  }
  if (taken < code_count) return "it has more nonzero codes than gaps";
  return place > places || places - place >= full ? "its gaps do not lead to its end" : nullptr;
}

}  // namespace nncx
