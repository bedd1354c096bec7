// entropy: the codec of codes at rest. Huffman codes of small symbols, and sparse codes by the gaps
// between them; nncx/_entropy.py puts both into payloads, docs/files.md has the format.
//
// A code is canonical, so its lengths say it all: codes of one length are successive numbers in the
// order of their symbols, and behind the last code of a length comes the first of the next, with a
// 0 appended. Its first bit is the first in the stream; bit j of a stream is bit j % 8 of byte
// j / 8, and the last byte is filled up with 0.
//
// Lengths are at most 12: the table of all windows of 12 bits then takes 16 KB, half of a first
// cache, and the window mostly holds two codes or more, which one look-up decodes together. Against
// a limit of 15 it costs nothing that could be measured: only symbols rarer than 1 in 4,096 notice.
// A code is complete: the codes of length l use up 2^-l each, and 1 together. So there is no window
// without a code, and a stream of n bits never holds more than n symbols. A lone symbol, or none,
// gets companions that are never used.
//
// Streams and lengths of files are untrusted: decoders read and write nothing outside what they are
// given, and say what is wrong.
#pragma once

#include <cstdint>

namespace nncx {

inline constexpr int kHuffmanMaxLength = 12;
inline constexpr int kHuffmanMaxSymbols = 256;

struct HuffmanCode {
  const uint8_t* lengths;  // [symbols], in bits; 0: the symbol has no code
  int symbols;             // at most kHuffmanMaxSymbols
};

struct HuffmanStream {
  HuffmanCode code;
  const uint8_t* bytes;  // [size]
  int64_t size;
  int64_t count;  // of symbols; count * width must fit int64_t
  int width;      // bits that a decoded symbol takes, 1 to 8
};

// Codes, most of them 0, by the nonzero ones: a gap below 2^gap_bits - 1 is a number of zeros and
// has a nonzero code behind them; 2^gap_bits - 1 is as many zeros, and the next gap goes on. Zeros
// behind the last code that fill no such gap are not said.
struct RelativeIndex {
  const uint8_t* gaps;  // [gap_count]
  int64_t gap_count;
  const uint8_t* codes;  // [code_count]
  int64_t code_count;
  int gap_bits;  // 1 to 8
  int width;     // bits of a code, 1 to 8
  int64_t size;  // of the packed codes; 8 * size must fit int64_t
};

// The lengths of a code that makes a text of `counts[symbol]` symbols as short as the limit allows.
// Sums of 12 times all counts must fit int64_t; `symbols` is at least 2.
void huffman_lengths(const int64_t* counts, int symbols, uint8_t* lengths);

// What is wrong with the code, the end of a sentence; nullptr if nothing. The functions below need
// one with which nothing is wrong.
const char* huffman_check(const HuffmanCode& code);

// Bits of the stream; -1 if a symbol has no code.
int64_t huffman_bits(const HuffmanCode& code, const uint8_t* symbols, int64_t count);

// Fills ceil(huffman_bits / 8) bytes.
void huffman_encode(const HuffmanCode& code, const uint8_t* symbols, int64_t count,
                    uint8_t* stream);

// Fills ceil(count * width / 8) bytes: the symbols one behind the other, `width` bits each, as
// nn.codes.pack_codes has them. Returns what is wrong with the stream, nullptr if nothing: it must
// hold `count` symbols and no byte more.
const char* huffman_decode(const HuffmanStream& stream, uint8_t* packed);

// Fills `size` bytes with the codes, packed as by huffman_decode. Returns what is wrong with the
// index, nullptr if nothing.
const char* relative_decode(const RelativeIndex& index, uint8_t* packed);

}  // namespace nncx
