// The augmentation's operator on torch's stable ABI: schema, checks, dispatch.
// Compiled once for each library: mim4dd._C (schema and CPU) and, with MIM4DD_CUDA, mim4dd._C_cuda.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "../require.h"
#include "kernels.h"

namespace {

using mim4dd::Call;
using mim4dd::Column;
using mim4dd::Kind;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr mim4dd::Require require{"mim4dd.augment.apply"};

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

constexpr std::array kNames{"brightness", "saturation", "contrast", "shift_y", "shift_x",
                            "cutout",     "flip",       "scale_x",  "scale_y", "degrees"};
constexpr std::array kDtypes{"float32 or float64", "float32 or float64", "float32 or float64", "int32 or int64",
                             "int32 or int64",     "int32 or int64",     "bool",               "float32 or float64",
                             "float32 or float64", "float32 or float64"};

Kind kind_of(const Tensor& field, size_t i) {
  const std::string_view allowed = kDtypes[i];
  const auto dtype = field.scalar_type();
  if (allowed == "bool" && dtype == ScalarType::Bool) return Kind::kBool;
  if (allowed == "int32 or int64" && dtype == ScalarType::Int) return Kind::kInt32;
  if (allowed == "int32 or int64" && dtype == ScalarType::Long) return Kind::kInt64;
  if (allowed == "float32 or float64" && dtype == ScalarType::Float) return Kind::kFloat;
  if (allowed == "float32 or float64" && dtype == ScalarType::Double) return Kind::kDouble;
  require(false, "params.", kNames[i], " must be of ", allowed);
  return Kind::kBool;
}

// As they are drawn: one tensor with a column for each of Field.
void set_packed(Call& call, const Tensor& images, const Tensor& packed) {
  require(packed.dim() == 2 && packed.size(1) == mim4dd::kFields && packed.scalar_type() == ScalarType::Float &&
              same_device(packed, images),
          "packed params must be float32 [rows, ", mim4dd::kFields, "] on the device of images");
  call.num_rows = packed.size(0);
  const auto* data = static_cast<const float*>(packed.const_data_ptr());
  for (int64_t field = 0; field < mim4dd::kFields; ++field)
    call.fields[field] = {data + field * packed.stride(1), packed.stride(0), Kind::kFloat};
}

void set_fields(Call& call, const Tensor& images, const std::vector<Tensor>& params) {
  if (params.size() == 1) return set_packed(call, images, params[0]);
  require(params.size() == kNames.size(), "params has ", params.size(), " fields, expected ", kNames.size());
  call.num_rows = params[0].dim() > 0 ? params[0].size(0) : -1;
  Column* column = call.fields;
  for (size_t i = 0; i < kNames.size(); ++i) {
    const Tensor& field = params[i];
    const bool box = column == call.fields + mim4dd::kTop;
    require(field.dim() == (box ? 2 : 1) && field.size(0) == call.num_rows && (!box || field.size(1) == 4),
            "params.", kNames[i], " must hold ", box ? "four numbers" : "a number", " for each of the ",
            call.num_rows, " rows");
    require(same_device(field, images), "params.", kNames[i], " is on another device than images");
    const Kind kind = kind_of(field, i);
    const char* data = static_cast<const char*>(field.const_data_ptr());
    for (int64_t edge = 0; edge < (box ? 4 : 1); ++edge)
      *column++ = {data + (box ? edge * field.stride(1) * field.element_size() : 0), field.stride(0), kind};
  }
}

void set_normalisation(Call& call, const Tensor& images, const std::optional<Tensor>& mean,
                       const std::optional<Tensor>& std) {
  require(mean.has_value() == std.has_value(), "mean and std are given together or not at all");
  if (!mean) return;
  for (const auto& [given, name, target] :
       {std::tuple{&*mean, "mean", &call.mean}, std::tuple{&*std, "std", &call.std}}) {
    require(given->dim() == 1 && given->size(0) == call.channels && given->is_contiguous() &&
                given->scalar_type() == ScalarType::Float && same_device(*given, images),
            name, " must be contiguous float32 [", call.channels, "] on the device of images");
    *target = static_cast<const float*>(given->const_data_ptr());
  }
}

#ifndef MIM4DD_CUDA
// Only where values can be read without waiting for a device; CUDA turns such an image into NaN.
void check_values(const Call& call) {
  size_t name = 0;
  for (int field = 0; field < mim4dd::kFields; ++field) {
    const Column& column = call.fields[field];
    const bool floating = column.kind == Kind::kFloat || column.kind == Kind::kDouble;
    for (int64_t row = 0; floating && row < call.num_rows; ++row)
      require(std::isfinite(column.at<float>(row)), "params.", kNames[name], " is not finite in row ", row);
    name += field < mim4dd::kTop || field >= mim4dd::kRight;
  }
  for (int64_t image = 0; image < call.batch; ++image)
    require(call.row(image) >= 0 && call.row(image) < call.num_rows, "rows[", image, "] is ", call.row(image),
            ", expected 0 to ", call.num_rows - 1);
  for (int channel = 0; call.std && channel < call.channels; ++channel)
    require(call.std[channel] > 0, "std is ", call.std[channel], " for channel ", channel,
            ", expected a positive number");
}
#endif

mim4dd::Strides strides_of(const Tensor& images) {
  return {images.stride(0), images.stride(1), images.stride(2), images.stride(3)};
}

// Like the images, channels_last included, but floating.
Tensor empty_like(const Tensor& images, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (images.is_contiguous()) {  // as mostly, and without looking for an operator by its name
    int32_t device = 0;
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(images.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(images.dim(), images.sizes().data(), images.strides().data(),
                                                    to<int32_t>(from(dtype)), device, images.get_device_index(),
                                                    &made));
    return Tensor(made);
  }
  std::array<StableIValue, 6> stack{from(images),       from(std::optional(dtype)), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt),         from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor augment(const Tensor& images, const std::vector<Tensor>& params, const std::optional<Tensor>& rows,
               const std::optional<Tensor>& mean, const std::optional<Tensor>& std, bool align_corners, bool adjoint) {
  require(images.dim() == 4, "images must be [batch, channels, height, width]");
  for (int64_t dim = 1; dim < 4; ++dim)
    require(images.size(dim) >= 1 && images.size(dim) <= mim4dd::kMaxSide,
            "images has a size that is not from 1 to ", mim4dd::kMaxSide, " in dimension ", dim);
  Call call{};
  call.batch = images.size(0);
  call.channels = static_cast<int>(images.size(1));
  call.height = static_cast<int>(images.size(2));
  call.width = static_cast<int>(images.size(3));
  call.align_corners = align_corners;
  call.adjoint = adjoint;
  set_fields(call, images, params);
  set_normalisation(call, images, mean, std);
  if (rows) {
    require(rows->dim() == 1 && rows->size(0) == call.batch && rows->scalar_type() == ScalarType::Long &&
                same_device(*rows, images),
            "rows must be int64 [", call.batch, "] on the device of images");
    call.rows = static_cast<const int64_t*>(rows->const_data_ptr());
    call.rows_stride = rows->stride(0);
  } else {
    require(call.num_rows == call.batch, "params has ", call.num_rows, " rows for ", call.batch, " images");
  }
  const ScalarType dtype = images.scalar_type();
  require(!adjoint || dtype != ScalarType::Byte, "images of bytes have no gradient");
  Tensor out = empty_like(images, dtype == ScalarType::Byte ? ScalarType::Float : dtype);
  call.in = images.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.in_strides = strides_of(images);
  call.out_strides = strides_of(out);
  if (call.batch == 0) return out;
#ifdef MIM4DD_CUDA
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(images.get_device_index(), &stream));
  const Tensor sums = torch::stable::new_empty(
      images, {call.batch, mim4dd::kSums}, dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  mim4dd::augment_cuda(call, dtype, sums.mutable_data_ptr(), stream);
#else
  check_values(call);
  mim4dd::augment_cpu(call, dtype);
#endif
  return out;
}

}  // namespace

#ifdef MIM4DD_CUDA

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CUDA, m) {
  m.impl("augment", TORCH_BOX(&augment));
  m.impl("augment_no_grad", TORCH_BOX(&augment));
}

#else

// Twice, as the package gives a gradient to the first; its autograd node calls the second.
STABLE_TORCH_LIBRARY_FRAGMENT(mim4dd, m) {
  m.def(
      "augment(Tensor images, Tensor[] params, Tensor? rows, Tensor? mean, Tensor? std, bool align_corners, "
      "bool adjoint) -> Tensor");
  m.def(
      "augment_no_grad(Tensor images, Tensor[] params, Tensor? rows, Tensor? mean, Tensor? std, "
      "bool align_corners, bool adjoint) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CPU, m) {
  m.impl("augment", TORCH_BOX(&augment));
  m.impl("augment_no_grad", TORCH_BOX(&augment));
}

#endif
