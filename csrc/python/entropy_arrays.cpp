#include "python/entropy_arrays.h"

#include <pybind11/numpy.h>

#include <string>

#include "entropy.h"

namespace {

namespace py = pybind11;

using nncx::HuffmanCode;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Counts = py::array_t<int64_t, py::array::c_style>;

// They are sizes of memory that the caller's own arrays are no larger than by more than this.
constexpr int64_t kMaxSize = int64_t{1} << 48;

void need(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

void need_vector(const py::array& array, const char* name) {
  need(array.ndim() == 1, std::string(name) + " must have one dimension, got " +
                              std::to_string(array.ndim()) + "; flatten it");
}

void need_bits(int bits, const char* name) {
  need(bits >= 1 && bits <= 8,
       std::string(name) + " must be 1 to 8 bits, got " + std::to_string(bits));
}

void need_symbols(int64_t symbols, int64_t most) {
  need(symbols >= 2 && symbols <= most, "a code must have 2 to " + std::to_string(most) +
                                            " symbols, got " + std::to_string(symbols));
}

// For untrusted bytes: `problem` is the end of a sentence.
void need_sound(const char* problem) {
  if (problem) throw py::value_error(problem);
}

HuffmanCode code_of(const Bytes& lengths, int64_t most_symbols) {
  need_vector(lengths, "lengths");
  need_symbols(lengths.size(), most_symbols);
  const HuffmanCode code = {lengths.data(), static_cast<int>(lengths.size())};
  need_sound(nncx::huffman_check(code));
  return code;
}

Bytes huffman_lengths(const Counts& counts) {
  need_vector(counts, "counts");
  need_symbols(counts.size(), nncx::kHuffmanMaxSymbols);
  int64_t sum = 0;
  for (py::ssize_t s = 0; s < counts.size(); ++s) {
    need(counts.data()[s] >= 0 && counts.data()[s] <= kMaxSize - sum,
         "counts must not be negative, and 2^48 together at most");
    sum += counts.data()[s];
  }
  Bytes lengths(counts.size());
  nncx::huffman_lengths(counts.data(), static_cast<int>(counts.size()), lengths.mutable_data());
  return lengths;
}

Bytes huffman_encode(const Bytes& symbols, const Bytes& lengths) {
  need_vector(symbols, "symbols");
  const HuffmanCode code = code_of(lengths, nncx::kHuffmanMaxSymbols);
  const uint8_t* text = symbols.data();
  const int64_t count = symbols.size();
  const int64_t bits = nncx::huffman_bits(code, text, count);
  need(bits >= 0, "symbols must all have a code, got one of length 0");
  Bytes stream((bits + 7) / 8);
  uint8_t* bytes = stream.mutable_data();
  {
    py::gil_scoped_release release;
    nncx::huffman_encode(code, text, count, bytes);
  }
  return stream;
}

Bytes huffman_decode(const Bytes& stream, const Bytes& lengths, int64_t count, int width) {
  need_vector(stream, "stream");
  need_bits(width, "a decoded symbol");
  const HuffmanCode code = code_of(lengths, 1 << width);
  // Each has a bit at least: what is allocated is in proportion to what is there.
  need(count >= 0 && count / 8 <= stream.size(), "its stream ends early");
  const nncx::HuffmanStream input = {code, stream.data(), stream.size(), count, width};
  Bytes packed((count * width + 7) / 8);
  uint8_t* bytes = packed.mutable_data();
  const char* problem;
  {
    py::gil_scoped_release release;
    problem = nncx::huffman_decode(input, bytes);
  }
  need_sound(problem);
  return packed;
}

Bytes relative_decode(const Bytes& gaps, const Bytes& codes, int gap_bits, int width,
                      int64_t size) {
  need_vector(gaps, "gaps");
  need_vector(codes, "codes");
  need_bits(gap_bits, "a gap");
  need_bits(width, "a code");
  // A gap stands for 256 codes of 8 bits at most.
  need(size >= 0 && size / 256 <= gaps.size(), "its gaps do not lead to its end");
  const nncx::RelativeIndex index = {gaps.data(), gaps.size(), codes.data(), codes.size(),
                                     gap_bits,    width,       size};
  Bytes packed(size);
  uint8_t* bytes = packed.mutable_data();
  const char* problem;
  {
    py::gil_scoped_release release;
    problem = nncx::relative_decode(index, bytes);
  }
  need_sound(problem);
  return packed;
}

}  // namespace

void bind_entropy(py::module_& m) {
  m.def("huffman_lengths", &huffman_lengths, py::arg("counts"),
        "Lengths of a Huffman code, uint8 [symbols], none above 12 bits, for int64 counts.");
  m.def("huffman_encode", &huffman_encode, py::arg("symbols"), py::arg("lengths"),
        "uint8 symbols as a stream of the canonical code of these lengths.");
  m.def("huffman_decode", &huffman_decode, py::arg("stream"), py::arg("lengths"), py::arg("count"),
        py::arg("width"), "The symbols of a whole stream, packed densely with so many bits each.");
  m.def("relative_decode", &relative_decode, py::arg("gaps"), py::arg("codes"), py::arg("gap_bits"),
        py::arg("width"), py::arg("size"),
        "`size` bytes of densely packed codes, by the nonzero ones and the gaps before them.");
}
