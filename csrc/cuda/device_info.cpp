#include "device_info.hpp"

#include <array>
#include <cstddef>
#include <utility>

#include "driver_api.hpp"
#include "versions.hpp"

namespace sidp::cuda {

namespace {

std::string uuid_text(const CUuuid& uuid) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "GPU";
  for (std::size_t i = 0; i < sizeof(uuid.bytes); ++i) {
    if (i == 0 || i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    const auto byte = static_cast<unsigned char>(uuid.bytes[i]);
    text += kDigits[byte >> 4];
    text += kDigits[byte & 0xF];
  }
  return text;
}

// Queries of one device; after the first failure the rest are skipped and `status` keeps its reason.
struct DeviceQuery {
  const DriverApi& api;
  CUdevice device;
  Status status;

  void expect(CUresult result, const std::string& what) {
    if (status.ok()) status = check(api, result, what + " for device " + std::to_string(device));
  }

  std::int32_t attribute(CUdevice_attribute which, const char* name) {
    int value = 0;
    if (status.ok())
      expect(api.cuDeviceGetAttribute(&value, which, device), std::string("cuDeviceGetAttribute(") + name + ')');
    return value;
  }
};

#define SIDP_CUDA_ATTRIBUTE(query, name) (query).attribute(CU_DEVICE_ATTRIBUTE_##name, #name)

Status describe(const DriverApi& api, std::int32_t ordinal, std::int32_t num_devices, DeviceInfo& info) {
  CUdevice device = 0;
  if (Status found = check(api, api.cuDeviceGet(&device, ordinal), "cuDeviceGet"); !found.ok()) return found;
  DeviceQuery query{api, device, {}};
  info.ordinal = ordinal;

  std::array<char, 256> name{};
  query.expect(api.cuDeviceGetName(name.data(), static_cast<int>(name.size()), device), "cuDeviceGetName");
  info.name = name.data();
  CUuuid uuid{};
  query.expect(api.cuDeviceGetUuid_v2(&uuid, device), "cuDeviceGetUuid");
  info.uuid = uuid_text(uuid);
  std::size_t memory_bytes = 0;
  query.expect(api.cuDeviceTotalMem(&memory_bytes, device), "cuDeviceTotalMem");
  info.memory_bytes = memory_bytes;

  info.compute_capability_major = SIDP_CUDA_ATTRIBUTE(query, COMPUTE_CAPABILITY_MAJOR);
  info.compute_capability_minor = SIDP_CUDA_ATTRIBUTE(query, COMPUTE_CAPABILITY_MINOR);
  info.num_sms = SIDP_CUDA_ATTRIBUTE(query, MULTIPROCESSOR_COUNT);
  info.num_async_engines = SIDP_CUDA_ATTRIBUTE(query, ASYNC_ENGINE_COUNT);
  info.stream_mem_ops_64bit = SIDP_CUDA_ATTRIBUTE(query, CAN_USE_64_BIT_STREAM_MEM_OPS) != 0;
  info.stream_wait_value_nor = SIDP_CUDA_ATTRIBUTE(query, CAN_USE_STREAM_WAIT_VALUE_NOR) != 0;
  info.flush_remote_writes = SIDP_CUDA_ATTRIBUTE(query, CAN_FLUSH_REMOTE_WRITES) != 0;

  for (std::int32_t peer = 0; peer < num_devices && query.status.ok(); ++peer) {
    int can_access = 1;
    if (peer != ordinal) {
      CUdevice peer_device = 0;
      query.expect(api.cuDeviceGet(&peer_device, peer), "cuDeviceGet of peer " + std::to_string(peer));
      if (!query.status.ok()) break;
      query.expect(api.cuDeviceCanAccessPeer(&can_access, device, peer_device),
                   "cuDeviceCanAccessPeer of peer " + std::to_string(peer));
    }
    info.can_access_peer.push_back(can_access != 0);
  }
  return query.status;
}

#undef SIDP_CUDA_ATTRIBUTE

Status fill(const DriverApi& api, CudaReport& report) {
  int driver = 0;
  if (Status read = check(api, api.cuDriverGetVersion(&driver), "cuDriverGetVersion"); !read.ok()) return read;
  report.driver = version_text(driver);
  if (Status started = check(api, api.cuInit(0), "cuInit"); !started.ok()) return started;
  int num_devices = 0;
  if (Status counted = check(api, api.cuDeviceGetCount(&num_devices), "cuDeviceGetCount"); !counted.ok())
    return counted;
  if (num_devices == 0)
    return {"the driver lists no device: check CUDA_VISIBLE_DEVICES, or give the container its GPUs"};
  for (std::int32_t ordinal = 0; ordinal < num_devices; ++ordinal) {
    DeviceInfo info;
    // A device that cannot be described is left out, and the reason says why.
    if (Status described = describe(api, ordinal, num_devices, info); !described.ok()) return described;
    report.devices.push_back(std::move(info));
  }
  return {};
}

}  // namespace

CudaReport cuda_report() {
  CudaReport report;
  report.compiled = true;
  report.compiled_version = compiled_version();
  const DriverApi& api = driver_api();
  report.reason = api.status.ok() ? fill(api, report).reason : api.status.reason;
  return report;
}

}  // namespace sidp::cuda
