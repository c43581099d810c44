#include "activations.h"

#include <cstddef>

namespace specmoe {
namespace {

constexpr int64_t kBlock = 32, kGroup = 128;  // columns, see inputs.h

// What `put` does not fill is zero.
template <class Value>
void make_room(Lines<Value>& values, int64_t count, bool is_padded) {
  if (is_padded) values.clear();
  values.resize(static_cast<size_t>(count));
}

}  // namespace

void Activations::reset(int64_t rows, int64_t width, InputForm form) {
  form_ = form;
  const int64_t step = is_int8(form) ? kGroup : kBlock;
  stride_ = (width + step - 1) / step * step;
  const int64_t count = rows * stride_;
  const bool is_padded = stride_ != width;
  if (is_int8(form)) {
    make_room(codes_, count, is_padded);
    make_room(scales_, count / kBlock, is_padded);
    lane_ = form == FORM_INT8 ? 4 : 8;
    make_room(minus_sums_, count / lane_, is_padded);
  } else if (form == FORM_BF16) {
    make_room(bf16_, count, is_padded);
  } else {
    make_room(values_, count, is_padded);
  }
}

void Activations::put(const Kernels& kernels, int64_t row, int64_t begin, int64_t count,
                      const float* values) {
  const int64_t at = row * stride_;
  InputRow out{form_, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (is_int8(form_)) {
    out.codes = codes_.data() + at;
    out.scales = scales_.data() + at / kBlock;
    out.minus_sums = minus_sums_.data() + at / lane_;
  } else if (form_ == FORM_BF16) {
    out.bf16 = bf16_.data() + at;
  } else {
    out.values = values_.data() + at;
  }
  kernels.put(out, begin, count, values);
}

Inputs Activations::inputs(const int32_t* rows, int64_t tokens) const {
  return {form_,          values_.data(),     bf16_.data(), codes_.data(),
          scales_.data(), minus_sums_.data(), rows,         stride_,
          tokens};
}

}  // namespace specmoe
